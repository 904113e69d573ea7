"""Batches without random access: iterable datasets, lists and custom loaders."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import count, islice
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from robo_orchard_lab.pipeline.batch_processor import count_batches, count_samples
from robo_orchard_lab.pipeline.data.epoch_batches import BatchIndices
from robo_orchard_lab.pipeline.data.fetching import (
    ReseededDataset,
    RngIsolation,
    RngStream,
    epoch_seed,
    indexed_seed,
    seed_rng,
)
from robo_orchard_lab.pipeline.data.loader import BatchShard, copy_loader, set_epoch_of
from robo_orchard_lab.pipeline.data.order import DataOrder, StepSizes
from robo_orchard_lab.pipeline.data.random_generators import (
    capture_generators,
    check_generators,
    loader_generators,
    restore_generators,
)
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals, worker_startup
from robo_orchard_lab.pipeline.distributed.collectives import gather_numbers, gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Text, errors_of

_END = object()
_CURES = (
    "use a stateful loader (torchdata's StatefulDataLoader; without workers, a dataset with "
    "state_dict and load_state_dict), or a map-style dataset, whose random numbers are keyed by "
    "epoch and batch, or read and drop the steps with DataOrder(fast_forward=True)"
)


_OF_RANK = StateSchema(
    optional=["stateful", "random"],
    stateful=Any,
    random=dict[str, Any],
)


class StreamData:
    """Batches of any iterable; the training process's RNGs are seeded for each batch.

    Each process reads its own loader, with equal seeds, so that all ranks shuffle equally. Ranks
    may have different numbers of batches. ``shard`` applies if Accelerate divides the batches.

    Raises:
        PipelineConfigError: ``keyed_by="sample"``, which needs a map-style dataset.
    """

    kind = "an iterable of batches"

    def __init__(
        self,
        loader: Iterable[Any],
        order: DataOrder,
        shard: BatchShard,
        progress: TrainerProgress,
        processes: int = 1,
        counter: Callable[[Any], int] = count_samples,
    ) -> None:
        if order.keyed_by == "sample":
            raise PipelineConfigError(
                "DataOrder: keyed_by='sample' needs a DataLoader of a map-style dataset, got "
                f"{type(loader).__name__}; use keyed_by='batch'"
            )
        self._user = loader
        self._loader = loader
        self._order = order
        self._shard = shard
        self._processes = processes
        self._progress = progress
        self._counter = counter
        self._generators = loader_generators(loader)
        self._stateful = _find_stateful(loader)
        self._is_list = type(loader) in (list, tuple)
        self.check_state: Callable[[Any], Any] | None = None
        """Function to call with the data's own state, once the next batch is loaded."""
        is_plain_loader = (
            isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        )
        reads_in_workers = is_plain_loader and loader.num_workers > 0  # type: ignore[attr-defined]
        self._skips_seeding = order.keyed_by == "none" or self._is_list or reads_in_workers
        self._reseeded: ReseededDataset | None = None
        if isinstance(loader, DataLoader) and is_plain_loader and loader.persistent_workers:
            self._reseeded = ReseededDataset(loader.dataset)
            self._loader = copy_loader(
                loader,
                dataset=self._reseeded,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                worker_init_fn=IgnoreSignals(loader.worker_init_fn),
            )
        self._length = self._agreed_length()
        self._sizes: list[StepSizes] | None = None
        """Sizes of the epoch's steps, for lists of equal length on all ranks."""
        self.most_samples = 0
        """Samples of the largest batch so far, without the current one."""
        self._isolation = RngIsolation()
        self._epoch_id: int | None = None
        self._epoch_start: Mapping[str, Any] | None = None
        """State of the generators when the epoch began."""
        self._yielded: deque[tuple[int, range]] = deque()
        """Sample numbers of yielded batches, by step."""
        self._first_number = 0
        """Number of the first sample that this process yields in the epoch."""
        self._states: dict[int, Any] = {}
        """Rank states by step, while batches are read before their steps."""
        self._ended_at: int | None = None
        """Step without a batch."""
        self._loaded: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def epoch(self, seed: int, epoch_id: int, step_id: int) -> Iterator[Any]:
        """Iterate over the batches of an epoch from a step on."""
        state, rank_state = self._loaded or ({}, {})
        self._loaded = None
        self._epoch_start = capture_generators(self._generators)  # first: set_epoch may draw
        set_epoch_of(self._user, epoch_id)
        self._epoch_id = epoch_id
        self._first_number = state["samples"] if step_id > 0 and state else 0
        self._yielded.clear()
        self._states.clear()
        self._ended_at = None
        self._length = self._agreed_length()
        self._sizes = self._agreed_sizes()
        if self._is_list:
            return self._numbered(islice(iter(self._loader), step_id, None), step_id)
        has_state = step_id > 0 and "stateful" in rank_state and not self._order.fast_forward
        if has_state:
            with errors_of(f"the data's {type(self._stateful).__qualname__}"):
                self._stateful.load_state_dict(rank_state["stateful"])
        first = step_id if has_state else 0
        if self._reseeded is not None:
            self._reseeded.seed, self._reseeded.epoch_id = seed, epoch_id
        with self._isolation, worker_startup():
            seed_rng(epoch_seed(seed, epoch_id, RngStream.ORDER))
            iterator = _iterate(self._loader)
        if has_state:
            restore_generators(rank_state["random"], self._generators)
        batches = self._seeded(iterator, epoch_seed(seed, epoch_id, RngStream.LOADING), first)
        for _ in range(step_id - first):
            next(batches, None)
        return self._numbered(batches, step_id)

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps of all processes; None if unknown."""
        return count_batches(self._user) if self._processes == 1 else self._length

    @property
    def loads_ahead(self) -> bool:
        """False if the batches may depend on the model, as of a stream that collects rollouts.

        A batch of the next step would then differ when it is loaded again after a resume.
        """
        return self._stateful is None

    @property
    def resume_problem(self) -> str | None:
        """Reason why a checkpoint from within an epoch can't be resumed, with remedies, or None."""
        if self._stateful is not None or self._is_list or self._order.fast_forward:
            return None
        is_loader = isinstance(self._user, DataLoader)
        of = f" of {type(self._user.dataset).__qualname__}" if is_loader else ""  # type: ignore[attr-defined]
        end = ", and an endless stream has no other" if self.steps_per_epoch is None else ""
        return (
            f"checkpoints from within an epoch can't be resumed{end}: {_type_name(self._user)}{of} "
            f"has no state to save, and an iterable can't seek; {_CURES}"
        )

    def _agreed_length(self) -> int | None:
        """Return the largest number of batches of any rank: a collective."""
        if self._processes == 1:
            return None
        own = count_batches(self._user)
        lengths = [length for [length] in gather_numbers([-1 if own is None else own])]
        return None if min(lengths) < 0 else max(lengths)

    def _agreed_sizes(self) -> list[StepSizes] | None:
        """Return the step sizes of lists: a collective."""
        if self._processes == 1 or not self._is_list:
            return None
        own = [self._counter(batch) for batch in self._user]
        ranks = gather_objects(own)
        if any(len(sizes) != len(own) for sizes in ranks):
            return None
        return list(map(StepSizes, own, map(sum, zip(*ranks, strict=True))))

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """Return the sizes of the steps from ``step_id`` on; None before they are loaded."""
        return None if self._sizes is None else islice(self._sizes, step_id, None)

    def batch_indices(self, step_id: int) -> BatchIndices | None:
        """Return the sample numbers of the current step's batch; None with several processes."""
        numbers = None if self._processes > 1 else self._numbers(step_id)
        return None if numbers is None else BatchIndices(step_id, numbers, None)

    def sample_count(self, step_id: int) -> int | None:
        """Return the number of samples of the current step's batch; None without a batch."""
        numbers = self._numbers(step_id)
        return None if numbers is None else len(numbers)

    def _numbers(self, step_id: int) -> range | None:
        self._forget_before(step_id)
        if not self._yielded or self._yielded[0][0] != step_id:
            return None
        return self._yielded[0][1]

    def state(self) -> Mapping[str, Any]:
        """Return the position of all processes in the epoch; equal on all ranks."""
        if self._loaded is not None:
            return self._loaded[0]
        has_begun = self._epoch_id == self._progress.epoch_id
        start = self._epoch_start if has_begun else None
        return {
            "loader": _type_name(self._loader),
            "processes": self._processes,
            "samples": self._samples_done() if has_begun else 0,
            "random": capture_generators(self._generators) if start is None else start,
        }

    def rank_state(self) -> Mapping[str, Any]:
        """Return the state of a stateful loader or dataset; empty between epochs."""
        if self._loaded is not None:
            return self._loaded[1]
        step_id = self._progress.step_id
        if self._stateful is None or step_id == 0:
            return {}
        ended = self._ended_at  # later states might belong to the next epoch
        saved = self._states.get(step_id if ended is None else min(step_id, ended))
        return self._stateful_state() if saved is None else saved

    schema = StateSchema(loader=Text, processes=Count, samples=Count, random=dict[str, Any])

    def check(
        self, state: Mapping[str, Any], rank_state: Mapping[str, Any], within_epoch: bool
    ) -> None:
        """Raise ``StateError`` if the data differs from the saved data; changes nothing."""
        check_generators(state["random"], self._generators)
        _OF_RANK.check(rank_state, "data of the rank")
        if "random" in rank_state:
            check_generators(rank_state["random"], self._generators)
        name = _type_name(self._loader)
        if state["loader"] != name:
            raise StateError(
                f"the data was of type {state['loader']} when the run was saved, and is {name}; "
                f"pass a {state['loader']}"
            )
        if within_epoch and state["processes"] != self._processes:
            raise StateError(
                f"the data was read by {state['processes']} processes when the run was saved, and "
                f"is read by {self._processes}; resume iterable data within an epoch with the same "
                "world size"
            )
        if not within_epoch or self._is_list or self._order.fast_forward:
            return
        was_saved = "stateful" in rank_state
        if was_saved and self._stateful is None:
            raise StateError(
                f"the data's own state was saved, but {name} has no state_dict and "
                "load_state_dict to restore it; pass the saved loader"
            )
        if not was_saved:
            raise StateError(
                f"the run was saved after {state['step_id']} steps of an epoch, and {name} "
                f"could not save its state; {_CURES}"
            )

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Make the next epoch resume from a state."""
        restore_generators(state["random"], self._generators)
        self._loaded = state, rank_state
        self._epoch_id = self._epoch_start = None

    def _stateful_state(self) -> Mapping[str, Any]:
        return {
            "stateful": self._stateful.state_dict(),
            "random": capture_generators(self._generators),
        }

    def _seeded(self, batches: Iterator[Any], seed: int, step_id: int) -> Iterator[Any]:
        processes, rank = self._shard.processes, self._shard.rank
        for step in count(step_id):
            if self._stateful is not None and (
                step > self._progress.step_id or self._processes > 1  # is read ahead
            ):
                self._states[step] = deepcopy(self._stateful_state())
            if self._skips_seeding:
                batch = next(batches, _END)
            else:
                with self._isolation:
                    seed_rng(indexed_seed(seed, step * processes + rank))
                    batch = next(batches, _END)
            if batch is _END:
                self._ended_at = step
                return
            yield batch

    def _numbered(self, batches: Iterator[Any], step_id: int) -> Iterator[Any]:
        """Yield the batches and note the numbers of their samples."""
        begin, size = self._first_number, 0
        for step, batch in enumerate(batches, start=step_id):
            if self.check_state is not None:
                if self._stateful is not None:
                    self.check_state(self._stateful.state_dict())
                self.check_state = None
            self._forget_before(self._progress.step_id)
            if size > self.most_samples:
                self.most_samples = size
            size = self._counter(batch)
            self._yielded.append((step, range(begin, begin + size)))
            begin += size
            yield batch

    def _samples_done(self) -> int:
        for step, numbers in self._yielded:
            if step == self._progress.step_id:  # was read ahead
                return numbers.start
        return self._yielded[-1][1].stop if self._yielded else self._first_number

    def _forget_before(self, step_id: int) -> None:
        # The last entry stays: it has the number of samples done.
        while len(self._yielded) > 1 and self._yielded[0][0] < step_id:
            self._yielded.popleft()
        if not self._states:
            return
        for step in [step for step in self._states if step < step_id and step != self._ended_at]:
            del self._states[step]


def _iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over batches; read a stream of this process as its loader does, 10 us faster.

    A loader warns if its stream is longer than the length that the dataset states.
    """
    if (
        type(loader) is not DataLoader
        or loader.num_workers > 0
        or loader.pin_memory
        or not isinstance(loader.dataset, IterableDataset)
        or isinstance(loader.dataset, IterDataPipe)
        or count_batches(loader.dataset) is not None
    ):
        return iter(loader)
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the loader's draw
    samples = iter(loader.dataset)
    if loader.batch_size is None:
        return map(loader.collate_fn, samples)
    return _collate(samples, loader.batch_size, loader.drop_last, loader.collate_fn)


def _collate(
    samples: Iterator[Any], batch_size: int, drop_last: bool, collate_fn: Callable[[Any], Any]
) -> Iterator[Any]:
    is_full = True
    while is_full:
        batch = list(islice(samples, batch_size))
        is_full = len(batch) == batch_size
        if is_full or (batch and not drop_last):
            yield collate_fn(batch)


def _type_name(loader: Any) -> str:
    """Return the class name of a loader, without Accelerate's wrapper."""
    return type(getattr(loader, "base_dataloader", loader)).__qualname__


def _find_stateful(loader: Any) -> Any:
    """Return the stateful loader, or its stateful dataset if read in this process, or None."""
    candidates = [loader]
    in_process = isinstance(loader, DataLoader) and loader.num_workers == 0
    if in_process and isinstance(loader.dataset, IterableDataset):
        candidates.append(loader.dataset)
    for candidate in candidates:
        if isinstance(candidate, (DataLoaderShard, DataLoaderDispatcher)):
            # All of them have the methods, but a state only around torchdata's loader.
            return candidate if candidate.use_stateful_dataloader else None
        if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
            return candidate
    return None
