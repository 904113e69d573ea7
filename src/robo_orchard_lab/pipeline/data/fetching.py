"""Loading a batch, in a worker or in the training process, with randomness of its own."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

from torch.utils.data import (
    ConcatDataset,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from robo_orchard_lab.pipeline.data.rng import (
    RandomGenerator,
    ReseededDataset,
    RngIsolation,
    dataset_generators,
    generator_states,
    seed_generators,
    seed_rng,
    set_generator_states,
)


class Task(NamedTuple):
    """What a batch is loaded from."""

    epoch_id: int
    batch_id: int
    """Among those of all processes in the epoch."""
    indices: Any
    """The dataset's: a list of them, or one that the dataset makes a whole batch of."""
    seed: int | None
    """Of what is drawn for the batch, or for collating it; None where nothing is drawn."""
    sample_seeds: list[int] | None
    """Of what is drawn for each sample, where it is keyed by sample."""


class Fetcher(Dataset[Any]):
    """From a task to a batch: the items of the user's dataset, put together by their collate_fn.

    Args:
        dataset: the user's.
        collate_fn: the user's.
        batched: whether a task has a list of indices, each of which gives a sample.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], batched: bool) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batched = batched
        self.epoch_id: int | None = None
        """The epoch that the dataset was last told of."""
        self._aside: RngIsolation | None = None
        self._found_in: int | None = None
        """The epoch for which the generators below were looked for."""
        self._kept: dict[str, RandomGenerator] = {}
        """The random generators that the dataset and the collate_fn keep."""

    def __getitem__(self, task: Task) -> Any:
        if get_worker_info() is not None:
            if task.epoch_id != self._found_in:
                self._begin(task.epoch_id)
            return self._load(task)
        if task.seed is None:
            return self._load(task)
        if task.epoch_id != self._found_in:
            self._begin(task.epoch_id)
        if self._aside is None:
            self._aside = RngIsolation()
        with self._aside:
            if not self._kept:
                return self._load(task)
            states = generator_states(self._kept)
            try:
                return self._load(task)
            finally:
                set_generator_states(self._kept, states)

    def _load(self, task: Task) -> Any:
        seed, dataset, indices = task.seed, self.dataset, task.indices
        try:
            if task.sample_seeds is not None:
                samples = self._sample_by_sample(task)
                self._seed(seed)
            else:
                self._seed(seed)
                if not self.batched:
                    samples = dataset[indices]
                elif getattr(dataset, "__getitems__", None):
                    samples = dataset.__getitems__(indices)
                else:
                    samples = [dataset[index] for index in indices]
            return self.collate_fn(samples)
        except Exception as error:
            error.add_note(
                f"while loading batch {task.batch_id} of epoch {task.epoch_id}, "
                f"of the dataset's indices {indices!r:.200}"
            )
            raise

    def _sample_by_sample(self, task: Task) -> Any:
        seeds = task.sample_seeds or []
        if not self.batched:
            self._seed(seeds[0])
            return self.dataset[task.indices]
        samples = []
        for index, seed in zip(task.indices, seeds, strict=True):
            self._seed(seed)
            samples.append(self.dataset[index])
        return samples

    def _seed(self, seed: int | None) -> None:
        if seed is not None:
            seed_rng(seed)
            if self._kept:
                seed_generators(self._kept, seed)

    def _begin(self, epoch_id: int) -> None:
        """The first batch of an epoch in this process, which may be a worker that outlives one."""
        if epoch_id != self.epoch_id:
            self.epoch_id = epoch_id
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch_id)
        self._found_in = epoch_id
        self._kept = dataset_generators("", (self.dataset, self.collate_fn))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_aside": None, "_found_in": None, "_kept": {}}


def identity(batch: Any) -> Any:
    """A collate_fn for what is a batch already."""
    return batch


def is_deterministic(dataset: Any, collate_fn: Any) -> bool:
    """Whether nothing is drawn while loading for sure, so that seeding can be left out."""
    return collate_fn in (default_collate, default_convert) and _holds_its_items(dataset)


def _holds_its_items(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _holds_its_items(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_holds_its_items(part) for part in dataset.datasets)
    return type(dataset) in (TensorDataset, list, tuple)


# --- worker signals --------------------------------------------------------------------------
# Worker processes of data loaders that leave signals to the process that they work for.
#
# A signal that is to end a job often goes to all of its processes: Ctrl-C, a scheduler's SIGTERM. A
# worker that dies of it has its main process fail in the middle of a step, or wait for data that
# never comes, when it could have saved the run.


WorkerInitFn: TypeAlias = Callable[[int], object]

_LAST_WAIT_S = 1.0  # for processes that clean up when they are told to end

_taken: tuple[int, ...] = ()  # of the whole process, as its handlers are
_started: set[BaseProcess] = set()  # while signals were taken, and not ended with that


@contextmanager
def ignore_signals_in_workers(signals: Iterable[int]) -> Iterator[None]:
    """Have workers that are started meanwhile outlive these signals.

    Only workers with a :class:`IgnoreSignals` do. They ignore them, but for SIGTERM: the second one
    ends a worker, since that is how a main process ends one that hangs. Workers that are still
    there when this process ends, such as persistent ones, are ended with it.
    """
    global _taken
    before, _taken = _taken, tuple(signals)
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        _taken = before
        ours = set(multiprocessing.active_children()).difference(others)
        _started.update(child for child in ours if child.daemon)
        atexit.unregister(_end_started)
        atexit.register(_end_started)


@contextmanager
def worker_startup() -> Iterator[None]:
    """Around the start of workers that have a :class:`IgnoreSignals`: hold the taken signals back.

    Until a worker has called it, which takes a moment, it would die of them. Those that come are
    handled at the end, in the worker as in the main process. This is of use in the thread that
    starts the workers, which is the main thread.
    """
    if not _taken or sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _taken)  # workers inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class IgnoreSignals:
    """A ``worker_init_fn`` that leaves signals to the main process, then does what another does.

    Args:
        worker_init_fn: the one to call; None where there is none.
    """

    def __init__(self, worker_init_fn: WorkerInitFn | None = None) -> None:
        self.worker_init_fn = worker_init_fn
        self._signals: tuple[int, ...] | None = None  # set in a worker that is no fork

    def __call__(self, worker_id: int) -> None:
        taken = _taken if self._signals is None else self._signals
        for number in taken:
            outlives = _ignore_once if number == signal.SIGTERM else signal.SIG_IGN
            signal.signal(number, outlives)
        if taken and sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)  # see worker_startup
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)

    def __reduce__(self) -> tuple[type[IgnoreSignals], tuple[WorkerInitFn | None], object]:
        return type(self), (self.worker_init_fn,), {"_signals": _taken}  # for another process


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _end_started() -> None:
    """At the interpreter's end, ahead of multiprocessing's, which tells each once, and waits."""
    left = _started.intersection(multiprocessing.active_children())
    if not left:
        return
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
    for child in left:
        child.terminate()
    end_at = time.monotonic() + _LAST_WAIT_S
    for child in left:
        child.join(max(0.0, end_at - time.monotonic()))
        child.kill()


# --- worker start ----------------------------------------------------------------------------
# What a worker does before it loads.


class WorkerInit(IgnoreSignals):
    """Makes a worker what the user's functions expect: ``get_worker_info().dataset`` is theirs.

    It also leaves to the main process the signals that are for that.
    """

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (Fetcher, ReseededDataset)):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it is read-only
        super().__call__(worker_id)
