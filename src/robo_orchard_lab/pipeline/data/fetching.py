"""Loading of a batch with seeded RNGs, and start of worker processes.

:class:`Fetcher` replaces the user's dataset in the rebuilt loader. :class:`IgnoreSignals` keeps
workers alive if a signal such as Ctrl-C reaches all processes of a job: a worker that dies makes
the main process fail or hang within a step, when it could have saved the run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import time
import traceback
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

from robo_orchard_lab.pipeline.data import rng
from robo_orchard_lab.pipeline.data.slots import PackedBatches, Slot, SlotWriter


class Task(NamedTuple):
    """Request to load a batch."""

    epoch_id: int
    batch_id: int
    """Number of the batch in the epoch, over all processes, from 0."""
    indices: Any
    """List of dataset indices, or one index of a complete batch."""
    seed: int | None
    """Seed of the batch, or of ``collate_fn`` if samples have their own; None disables seeding."""
    sample_seeds: list[int] | None
    """Seed of each sample with ``keyed_by="sample"``."""


class TaskGroup(NamedTuple):
    """Request to a worker to load some batches."""

    tasks: list[Task]
    slot: Slot


class LoadedGroup(NamedTuple):
    """Result of a :class:`TaskGroup`."""

    packed: PackedBatches
    failed: tuple[Task, str] | None
    """Task after the batches that failed, and the traceback."""
    seconds: float
    """Time to load a batch."""


class Fetcher(Dataset[Any]):
    """Dataset of batches, indexed by :class:`Task`, from the user's dataset and ``collate_fn``.

    Indexed by :class:`TaskGroup`, it returns a :class:`LoadedGroup`.

    In the training process, the RNGs and the dataset's generators are restored afterwards. A task
    has a list of indices, one for each sample, if ``batched``.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], batched: bool) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batched = batched
        self.epoch_id: int | None = None
        """Epoch of the dataset's last ``set_epoch``."""
        self._isolation = rng.RngIsolation()
        self._slots = SlotWriter()
        self._searched_epoch: int | None = None
        self._generators: dict[str, rng.RandomGenerator] = {}
        """Generators of the dataset and of ``collate_fn``, found at the first task of an epoch."""

    def __getitem__(self, task: Task | TaskGroup) -> Any:
        if isinstance(task, TaskGroup):
            return self._load_group(task)
        in_worker = get_worker_info() is not None
        if not in_worker and task.seed is None:
            return self._load(task)
        if task.epoch_id != self._searched_epoch:
            self._begin_epoch(task.epoch_id)
        if in_worker:
            return self._load(task)
        with self._isolation:
            if not self._generators:
                return self._load(task)
            states = rng.generator_states(self._generators)
            try:
                return self._load(task)
            finally:
                rng.set_generator_states(self._generators, states)

    def _load_group(self, group: TaskGroup) -> LoadedGroup:
        batches: list[Any] = []
        failed = None
        began_at = time.perf_counter()
        for task in group.tasks:
            try:
                batches.append(self[task])
            except Exception:  # of the dataset; the task alone raises it again, in its place
                if not batches:
                    raise
                failed = task, traceback.format_exc()
                break
        seconds = (time.perf_counter() - began_at) / len(batches)
        return LoadedGroup(self._slots.pack(batches, group.slot), failed, seconds)

    def _load(self, task: Task) -> Any:
        dataset, indices = self.dataset, task.indices
        try:
            if task.sample_seeds is not None:
                samples = []
                for index, seed in zip(
                    indices if self.batched else [indices], task.sample_seeds, strict=True
                ):
                    self._seed(seed)
                    samples.append(dataset[index])
                samples = samples if self.batched else samples[0]
                self._seed(task.seed)
            else:
                self._seed(task.seed)
                if not self.batched:
                    samples = dataset[indices]
                elif getattr(dataset, "__getitems__", None):
                    samples = dataset.__getitems__(indices)
                else:
                    samples = [dataset[index] for index in indices]
            return self.collate_fn(samples)
        except Exception as error:
            error.add_note(
                f"while loading batch {task.batch_id + 1} of epoch {task.epoch_id + 1}, "
                f"of the dataset's indices {indices!r:.200}"
            )
            raise

    def _seed(self, seed: int | None) -> None:
        if seed is not None:
            rng.seed_rng(seed)
            if self._generators:
                rng.seed_generators(self._generators, seed)

    def _begin_epoch(self, epoch_id: int) -> None:
        if epoch_id != self.epoch_id:
            self.epoch_id = epoch_id
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch_id)
        self._searched_epoch = epoch_id
        self._generators = rng.dataset_generators("", (self.dataset, self.collate_fn))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_searched_epoch": None, "_generators": {}}


def identity(batch: Any) -> Any:
    """Return a batch unchanged, as a ``collate_fn``."""
    return batch


def is_deterministic(dataset: Any, collate_fn: Any) -> bool:
    """Return True if loading is known to draw no random numbers and needs no seeds."""
    return collate_fn in (default_collate, default_convert) and _holds_its_items(dataset)


def _holds_its_items(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _holds_its_items(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_holds_its_items(part) for part in dataset.datasets)
    return type(dataset) in (TensorDataset, list, tuple)


WorkerInitFn: TypeAlias = Callable[[int], object]

_TERMINATE_TIMEOUT_S = 1.0

_ignored: tuple[int, ...] = ()  # by workers that start now; signal handlers are global, too
_started: set[BaseProcess] = set()  # daemons that started while signals were ignored


@contextmanager
def ignore_signals_in_workers(signals: Iterable[int]) -> Iterator[None]:
    """Ignore signals in workers started in this context, if they have :class:`IgnoreSignals`.

    A second SIGTERM still ends a worker, as a main process does with one that hangs. Workers that
    remain when this process exits, such as persistent ones, are killed.
    """
    global _ignored
    before, _ignored = _ignored, tuple(signals)
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        _ignored = before
        new = set(multiprocessing.active_children()).difference(others)
        _started.update(child for child in new if child.daemon)
        atexit.unregister(_kill_started)
        atexit.register(_kill_started)


@contextmanager
def worker_startup() -> Iterator[None]:
    """Block the ignored signals while workers start, until :class:`IgnoreSignals` is called.

    Must run in the thread that starts the workers, the main thread. Blocked signals are delivered
    at the end.
    """
    if not _ignored or sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ignored)  # workers inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class IgnoreSignals:
    """``worker_init_fn`` that ignores signals, then calls the user's function, if any.

    For the function, ``get_worker_info().dataset`` is the user's dataset.
    """

    def __init__(self, worker_init_fn: WorkerInitFn | None = None) -> None:
        self.worker_init_fn = worker_init_fn
        self._signals: tuple[int, ...] | None = None  # set by unpickling in a spawned worker

    def __call__(self, worker_id: int) -> None:
        ignored = _ignored if self._signals is None else self._signals
        for number in ignored:
            handler = _ignore_once if number == signal.SIGTERM else signal.SIG_IGN
            signal.signal(number, handler)
        if ignored and sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)  # see worker_startup
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (Fetcher, rng.ReseededDataset)):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # WorkerInfo is read-only
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)

    def __reduce__(self) -> tuple[type[IgnoreSignals], tuple[WorkerInitFn | None], object]:
        return type(self), (self.worker_init_fn,), {"_signals": _ignored}


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _kill_started() -> None:
    """Kill workers at exit; multiprocessing would send a single SIGTERM and wait."""
    running = _started.intersection(multiprocessing.active_children())
    if not running:
        return
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a worker dies
    for child in running:
        child.terminate()
    deadline = time.monotonic() + _TERMINATE_TIMEOUT_S
    for child in running:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
