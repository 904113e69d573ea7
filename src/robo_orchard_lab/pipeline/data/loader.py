"""The loader that a user made, where Accelerate has made another one of it; and copies of one."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    prepare_data_loader,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

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


logger = job_logger(__name__)

_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_map_style(loader: Any) -> bool:
    """Whether it is a ``DataLoader``, and no class that iterates otherwise, of indexed data."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def explain_no_batch(loader: Any) -> str:
    """What to look at where a pass over the data has had no batch."""
    loader = getattr(loader, "base_dataloader", loader)
    if is_map_style(loader):
        batches = loader if loader.batch_sampler is None else loader.batch_sampler
        size = getattr(batches, "batch_size", None)
        if getattr(batches, "drop_last", False):
            return (
                f"its {len(loader.dataset)} samples are less than one step of all processes takes, "
                f"of {size} samples on each, and drop_last=True drops them: give drop_last=False, "
                "a smaller batch_size or more data"
            )
        return "its dataset or its sampler gives no sample"
    return "an iterator can be read only once: pass an iterable that can be iterated every epoch"


def unwrap_loader(loader: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """What is to be given an order: one with an index as it was before it was prepared.

    One of torchdata's is taken for a plain one, since its place is known without its state, and
    what is drawn in its workers is no part of that. Loaders without an index are left as they are,
    so that each process reads what its own gives, unless Accelerate is asked to divide the batches
    (``dispatch_batches``) or to save their state (``use_stateful_dataloader``).

    Its seedable sampler takes the place of a ``RandomSampler`` where it is asked for with a
    ``data_seed``; without one, the order follows from a seed anyway. ``dispatch_batches`` means
    nothing to data with an index, of which each process loads its own batches.

    Raises:
        PipelineConfigError: it was made by ``accelerate.skip_first_batches``.
    """
    prepared = isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) and is_map_style(
        loader.base_dataloader
    ):
        loader = _unprepared(loader.base_dataloader)
    elif isinstance(loader, DataLoader) and _is_torchdatas_of_an_index(loader):
        loader = _plain(loader)
    config = accelerator.dataloader_config
    if isinstance(loader, DataLoader) and is_map_style(loader):
        if not loader.in_order:
            logger.warning(
                "the data loader has in_order=False, which gives batches as workers finish them; "
                "they are given in order, so that a resumed run finds them again"
            )
        if config.use_seedable_sampler and config.data_seed is not None:
            return _with_seedable_sampler(loader, config.data_seed)
        return loader
    several = accelerator.num_processes > 1
    divides = several and config.dispatch_batches is not None
    divisible = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if prepared or not divisible or not (divides or config.use_stateful_dataloader):
        return loader
    changed: Any
    if divides or not several:
        changed = accelerator.prepare(loader)
    else:
        changed = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_stateful_dataloader=True
        )
    inner = changed.base_dataloader  # a copy, which is nobody else's
    inner.worker_init_fn = IgnoreSignals(inner.worker_init_fn)
    return changed  # type: ignore[no-any-return]  # an iterable


def copy_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader with the same options; ``changes`` has the sampler or batch sampler at least."""
    options = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": getattr(loader, "in_order", True),  # torchdata's has none
    }
    with warnings.catch_warnings(action="ignore"):  # which the first one gave already
        return DataLoader(**{**options, **changes})


def _is_torchdatas_of_an_index(loader: DataLoader[Any]) -> bool:
    torchdatas = type(loader).__module__.startswith("torchdata.")
    return torchdatas and not isinstance(loader.dataset, IterableDataset)


def _plain(loader: DataLoader[Any]) -> DataLoader[Any]:
    batches: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(batches, BatchSampler):
        batches = BatchSampler(batches.sampler, batches.batch_size, batches.drop_last)
    return _made_of(loader, batches)


def _unprepared(loader: DataLoader[Any]) -> DataLoader[Any]:
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(batches, SkipBatchSampler):
        raise PipelineConfigError(
            "the data loader is one of accelerate.skip_first_batches, which skips the same batches "
            "in every epoch; give the loader that it was made of: a resumed run goes to its place"
        )
    if isinstance(batches, BatchSamplerShard):
        batches = _without_accelerates_generator(batches.batch_sampler, loader)
    return _made_of(loader, batches)


def _without_accelerates_generator(batches: Any, loader: DataLoader[Any]) -> Any:
    """With the sampler as it was: Accelerate gives each that has no generator one, of many ranks.

    It has a seed of 63 bits, drawn, where a user's has the default or a number of 32 bits.
    """
    sampler: Any = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) not in _DRAWING:
        return batches
    given: torch.Generator | None = sampler.generator
    if given is None or loader.generator is not None:
        return batches
    seed = given.initial_seed()
    if seed == torch.Generator().initial_seed() or seed < 2**32:
        return batches
    plain: Any = copy.copy(sampler)
    plain.generator = None
    return BatchSampler(plain, batches.batch_size, batches.drop_last)


def _with_seedable_sampler(loader: DataLoader[Any], data_seed: int) -> DataLoader[Any]:
    """With the sampler that Accelerate puts in place of a ``RandomSampler``."""
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) is not RandomSampler:
        return loader
    seedable = SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler.num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )
    return _made_of(loader, BatchSampler(seedable, batches.batch_size, batches.drop_last))


def _made_of(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    if loader.batch_sampler is None:
        return copy_loader(loader, batch_size=None, sampler=batches)
    return copy_loader(loader, batch_sampler=batches)
