"""Batches that can only be read one after another: streams, lists, loaders of one's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import count, islice
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset

from robo_orchard_lab.pipeline.batch_processor import count_batches, count_samples
from robo_orchard_lab.pipeline.data.epoch_batches import BatchIndices
from robo_orchard_lab.pipeline.data.fetching import WorkerInit, worker_startup
from robo_orchard_lab.pipeline.data.loader import BatchShard, copy_loader, set_epoch_of
from robo_orchard_lab.pipeline.data.order import DataOrder, StepSizes
from robo_orchard_lab.pipeline.data.rng import (
    ReseededDataset,
    RngIsolation,
    RngStream,
    capture_generators,
    check_generators,
    epoch_seed,
    indexed_seed,
    loader_generators,
    restore_generators,
    seed_rng,
)
from robo_orchard_lab.pipeline.distributed.collectives import gather_numbers, gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress

_END = object()


class StreamData:
    """The batches of any iterable; what this process draws while reading them is keyed by batch.

    Several processes each read what their own loader gives, and draw alike while they do, so that
    they shuffle alike what each then takes its part of. They may have different numbers of batches.

    Args:
        loader: any iterable of batches that can be iterated every epoch.
        order: what the order follows from.
        share: of this process, where Accelerate divides the batches.
        progress: what the run has done.
        processes: of the job.

    Raises:
        PipelineConfigError: its randomness can't be keyed by sample.
    """

    kind = "an iterable of batches"

    def __init__(
        self,
        loader: Iterable[Any],
        order: DataOrder,
        share: BatchShard,
        progress: TrainerProgress,
        processes: int = 1,
    ) -> None:
        if order.keyed_by == "sample":
            raise PipelineConfigError(
                "DataOrder: keyed_by='sample' needs a DataLoader of a dataset with an index, got "
                f"{type(loader).__name__}, whose samples can't be told apart; use 'batch'"
            )
        self._user = loader
        self._loader = loader
        self._order = order
        self._share = share
        self._processes = processes
        self._progress = progress
        self._sources = loader_generators(loader)
        self._stateful = _stateful_part(loader)
        self._listed = type(loader) in (list, tuple)
        self._quiet = order.keyed_by == "none" or self._listed or _reads_in_workers(loader)
        self._reseeded: ReseededDataset | None = None
        if isinstance(loader, DataLoader) and loader.persistent_workers and _is_plain(loader):
            self._reseeded = ReseededDataset(loader.dataset)
            self._loader = _with_dataset(loader, self._reseeded)
        self._length = self._agreed_length()
        self._sizes: list[StepSizes] | None = None
        """Of the steps of the epoch, where all ranks have lists of as many batches."""
        self._aside = RngIsolation()
        self._epoch_id: int | None = None
        self._start: Mapping[str, Any] | None = None
        self._given: deque[tuple[int, range]] = deque()
        """The numbers of the samples of batches that were given, by step."""
        self._begin = 0
        """The number of the first sample that was, or will be, given."""
        self._states: dict[int, Any] = {}
        """Of the stateful part by step, where batches are read ahead of their steps."""
        self._ended_at: int | None = None
        """The step for which there was no batch left."""
        self._loaded: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def epoch(self, seed: int, epoch_id: int, step_id: int) -> Iterator[Any]:
        """The batches of an epoch from a step on."""
        state, rank_state = self._loaded or ({}, {})
        self._loaded = None
        self._start = capture_generators(self._sources)  # first: a dataset may draw when it is told
        set_epoch_of(self._user, epoch_id)
        self._epoch_id = epoch_id
        self._begin = state["samples"] if step_id > 0 and state else 0
        self._given.clear()
        self._states.clear()
        self._ended_at = None
        self._length = self._agreed_length()
        self._sizes = self._agreed_sizes()
        if self._listed:
            return self._noted(islice(iter(self._loader), step_id, None), step_id)
        goes_on = step_id > 0 and "stateful" in rank_state and not self._order.fast_forward
        if goes_on:
            self._stateful.load_state_dict(rank_state["stateful"])
        first = step_id if goes_on else 0
        key = epoch_seed(seed, epoch_id, RngStream.LOADING)
        if self._reseeded is not None:
            self._reseeded.seed, self._reseeded.epoch_id = seed, epoch_id
        with self._aside, worker_startup():
            seed_rng(epoch_seed(seed, epoch_id, RngStream.ORDER))
            batches = iter(self._loader)
        if goes_on:
            restore_generators(rank_state["random"], self._sources)
        batches = self._keyed(batches, key, first)
        for _ in range(step_id - first):
            next(batches, None)
        return self._noted(batches, step_id)

    @property
    def steps_per_epoch(self) -> int | None:
        """Of the job; None where it is not known."""
        return count_batches(self._user) if self._processes == 1 else self._length

    def _agreed_length(self) -> int | None:
        """That of the rank with the most batches, where there are several: a collective."""
        if self._processes == 1:
            return None
        own = count_batches(self._user)
        lengths = [length for [length] in gather_numbers([-1 if own is None else own])]
        return None if min(lengths) < 0 else max(lengths)

    def _agreed_sizes(self) -> list[StepSizes] | None:
        """A collective, where there are several processes and lists."""
        if self._processes == 1 or not self._listed:
            return None
        own = [count_samples(batch) for batch in self._user]
        ranks = gather_objects(own)
        if any(len(sizes) != len(own) for sizes in ranks):
            return None
        return list(map(StepSizes, own, map(sum, zip(*ranks, strict=True))))

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """Of lists as long on all ranks; else not known, since only loading the batches tells."""
        return None if self._sizes is None else islice(self._sizes, step_id, None)

    def batch_indices(self, step_id: int) -> BatchIndices | None:
        """The numbers of the samples in the batch of the step that the run is in."""
        self._forget_before(step_id)
        if self._processes > 1 or not self._given or self._given[0][0] != step_id:
            return None
        return BatchIndices(step_id, self._given[0][1], None)

    def state(self) -> Mapping[str, Any]:
        """What the rest of the epoch follows from, beside the seed."""
        if self._loaded is not None:
            return self._loaded[0]
        begun = self._epoch_id == self._progress.epoch_id
        start = self._start if begun else None
        return {
            "loader": _name_of(self._loader),
            "processes": self._processes,
            "samples": self._samples_done() if begun else 0,
            "random": capture_generators(self._sources) if start is None else start,
        }

    def rank_state(self) -> Mapping[str, Any]:
        """Of the part that can save its own, within an epoch."""
        if self._loaded is not None:
            return self._loaded[1]
        step_id = self._progress.step_id
        if self._stateful is None or step_id == 0:
            return {}
        ended = self._ended_at  # a state of later might be that of the next epoch
        ahead = self._states.get(step_id if ended is None else min(step_id, ended))
        return self._state_now() if ahead is None else ahead

    def check(
        self, state: Mapping[str, Any], rank_state: Mapping[str, Any], within_epoch: bool
    ) -> None:
        """Refuse what :meth:`load` could not go on from; raises ``StateError``."""
        check_generators(state["random"], self._sources)
        name = _name_of(self._loader)
        if state["loader"] != name:
            raise StateError(
                f"the data was of type {state['loader']} when it was saved, and is {name}; give "
                "the same"
            )
        saved = "stateful" in rank_state
        if within_epoch and state["processes"] != self._processes:
            raise StateError(
                f"the data was read by {state['processes']} processes when it was saved, "
                f"and is by {self._processes}; within an epoch, data without an index "
                "needs the same number"
            )
        if not within_epoch or self._listed or self._order.fast_forward:
            return
        if saved and self._stateful is not None:
            return
        if saved:
            raise StateError(
                f"the data's own state was saved, and {name} has no state_dict and "
                "load_state_dict to take it over; give the same loader"
            )
        raise StateError(
            f"the run was saved within an epoch, after {state['step_id']} steps of it, and {name} "
            "could not save its state; give data that can (torchdata's StatefulDataLoader; without "
            "workers, a dataset with state_dict and load_state_dict), or have all that was done "
            "read and dropped, with DataOrder(fast_forward=True)"
        )

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Have the next epoch begin, and go on, as the saved run would have."""
        restore_generators(state["random"], self._sources)
        self._loaded = state, rank_state
        self._epoch_id = self._start = None

    def _state_now(self) -> Mapping[str, Any]:
        return {
            "stateful": self._stateful.state_dict(),
            "random": capture_generators(self._sources),
        }

    def _keyed(self, batches: Iterator[Any], key: int, step_id: int) -> Iterator[Any]:
        processes, rank = self._share.processes, self._share.rank
        for step in count(step_id):
            ahead = step > self._progress.step_id or self._processes > 1
            if self._stateful is not None and ahead:
                self._states[step] = deepcopy(self._state_now())
            if self._quiet:
                batch = next(batches, _END)
            else:
                with self._aside:
                    seed_rng(indexed_seed(key, step * processes + rank))
                    batch = next(batches, _END)
            if batch is _END:
                self._ended_at = step
                return
            yield batch

    def _noted(self, batches: Iterator[Any], step_id: int) -> Iterator[Any]:
        """The same batches, whose samples are numbered on the way."""
        begin = self._begin
        for step, batch in enumerate(batches, start=step_id):
            self._forget_before(self._progress.step_id)
            end = begin + count_samples(batch)
            self._given.append((step, range(begin, end)))
            begin = end
            yield batch

    def _samples_done(self) -> int:
        step_id = self._progress.step_id
        for step, numbers in self._given:
            if step == step_id:  # read ahead
                return numbers.start
        return self._given[-1][1].stop if self._given else self._begin

    def _forget_before(self, step_id: int) -> None:
        # The last one stays: it tells how many samples are done.
        while len(self._given) > 1 and self._given[0][0] < step_id:
            self._given.popleft()
        for step in [step for step in self._states if step < step_id and step != self._ended_at]:
            del self._states[step]


def _reads_in_workers(loader: Any) -> bool:
    """Whether only workers read, so that nothing is drawn here after the start of an epoch."""
    return _is_plain(loader) and loader.num_workers > 0


def _is_plain(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


def _with_dataset(loader: DataLoader[Any], dataset: IterableDataset[Any]) -> DataLoader[Any]:
    return copy_loader(
        loader,
        dataset=dataset,
        batch_size=loader.batch_size,
        drop_last=loader.drop_last,
        worker_init_fn=WorkerInit(loader.worker_init_fn),
    )


def _name_of(loader: Any) -> str:
    """Its class, without what Accelerate has wrapped around it for several processes."""
    return type(getattr(loader, "base_dataloader", loader)).__qualname__


def _stateful_part(loader: Any) -> Any:
    """The loader, or its dataset where that is read in this process, if it can save its state."""
    parts = [loader]
    in_process = isinstance(loader, DataLoader) and loader.num_workers == 0
    if in_process and isinstance(loader.dataset, IterableDataset):
        parts.append(loader.dataset)
    for part in parts:
        if isinstance(part, (DataLoaderShard, DataLoaderDispatcher)):
            # Of these, all have the methods, and those of torchdata's loader have a state.
            return part if part.use_stateful_dataloader else None
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            return part
    return None
