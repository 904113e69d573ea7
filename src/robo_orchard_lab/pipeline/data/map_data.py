"""The batches of a dataset with an index: any of them is found at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.epoch_batches import (
    BatchIndices,
    EpochBatches,
    IndexedBatches,
    IteratedBatches,
)
from robo_orchard_lab.pipeline.data.fetching import (
    Fetcher,
    Task,
    WorkerInit,
    identity,
    is_deterministic,
    worker_startup,
)
from robo_orchard_lab.pipeline.data.loader import BatchShard, copy_loader, set_epoch_of
from robo_orchard_lab.pipeline.data.order import (
    DataOrder,
    StepPartition,
    StepSizes,
    is_builtin,
    sampler_order,
)
from robo_orchard_lab.pipeline.data.rng import (
    PersistentRng,
    RngStream,
    capture_generators,
    check_generators,
    epoch_generator,
    epoch_seed,
    indexed_seed,
    iter_samplers,
    loader_generators,
    restore_generators,
)
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.progress import TrainerProgress

# --- sampler state ---------------------------------------------------------------------------
# What samplers of one's own keep from one epoch to the next, as state.


_SCALARS = (bool, int, float, str, type(None))
_MOST_NUMBERS = 2_000_000  # of a list or an array; a state is saved with every checkpoint


class SamplerState:
    """The attributes of samplers that change as they are used, such as a count of epochs.

    Numbers, texts, tensors, arrays, and lists of numbers or of batches of indices, of samplers
    other than torch's own. What is as it was when the loader was made is no state: it is the
    configuration, which may be changed.

    Args:
        dataloader: the loader that has the samplers, just made.
    """

    def __init__(self, dataloader: Any) -> None:
        self._samplers = {
            name: sampler
            for name, sampler in iter_samplers(dataloader)
            if type(sampler) is not BatchSampler and not is_builtin(sampler)
        }
        self._first = dict(self._attributes())

    def capture(self) -> dict[str, Any]:
        """What has changed, by the names of samplers and their attributes."""
        return {
            name: value
            for name, value in self._attributes()
            if name not in self._first or not _equal(value, self._first[name])
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have the samplers be as they were captured."""
        for name, value in state.items():
            place, _, attribute = name.rpartition(".")
            sampler = self._samplers.get(place)
            if sampler is not None:
                _put(sampler, attribute, value)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for place, sampler in self._samplers.items():
            for attribute, value in list(getattr(sampler, "__dict__", {}).items()):
                plain = _plain(value)
                if plain is not None:
                    yield f"{place}.{attribute}", plain[0]


def _plain(value: Any) -> tuple[Any] | None:
    """A copy that can be saved; None of what is no state."""
    if type(value) in _SCALARS:
        return (value,)
    if isinstance(value, torch.Tensor):
        return (value.detach().clone(),) if value.numel() <= _MOST_NUMBERS else None
    if isinstance(value, np.ndarray) and value.dtype.kind in "bif":
        return (torch.from_numpy(value.copy()),) if value.size <= _MOST_NUMBERS else None
    if type(value) is list and value and len(value) <= _MOST_NUMBERS:
        kind = type(value[0])
        if kind in (int, float) and all(type(item) is kind for item in value):
            return (torch.tensor(value, dtype=torch.int64 if kind is int else torch.float64),)
        if kind is list and sum(map(len, value)) <= _MOST_NUMBERS:
            return _plain_batches(value)
    return None


def _plain_batches(batches: list[Any]) -> tuple[Any] | None:
    flat = [index for batch in batches if type(batch) is list for index in batch]
    if len(flat) != sum(map(len, batches)) or not all(type(index) is int for index in flat):
        return None
    lengths = torch.tensor([len(batch) for batch in batches])
    return ({"flat": torch.tensor(flat, dtype=torch.int64), "lengths": lengths},)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _put(sampler: Any, attribute: str, value: Any) -> None:
    """Within what is there where it can be, since others may hold it, too."""
    now = getattr(sampler, attribute, None)
    if isinstance(value, dict):
        parts = value["flat"].split(value["lengths"].tolist())
        value = [part.tolist() for part in parts]
        if isinstance(now, list):
            now[:] = value
        else:
            setattr(sampler, attribute, value)
    elif isinstance(value, torch.Tensor) and isinstance(now, list):
        now[:] = value.tolist()
    elif isinstance(value, torch.Tensor) and isinstance(now, np.ndarray):
        array = value.numpy()
        if now.shape == array.shape and now.dtype == array.dtype:
            now[...] = array
        else:
            setattr(sampler, attribute, array.copy())
    else:
        setattr(sampler, attribute, value)


logger = job_logger(__name__)


class MapData:
    """A ``DataLoader``'s batches, in an order that follows from the seed and the epoch.

    Args:
        loader: the user's.
        order: what it follows from.
        share: of this process.
        progress: what the run has done.
    """

    kind = "a DataLoader of a dataset with an index"

    def __init__(
        self,
        loader: DataLoader[Any],
        order: DataOrder,
        share: BatchShard,
        progress: TrainerProgress,
    ) -> None:
        self._user = loader
        self._order = order
        self._share = share
        self._progress = progress
        self._made_of = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._listed = type(self._made_of) is BatchSampler
        self._sampler = self._made_of.sampler if type(self._made_of) is BatchSampler else None
        self._batched = loader.batch_sampler is not None
        self._sources = loader_generators(loader)
        self._samplers = SamplerState(loader)
        if share.processes > 1 and self._sources:
            shared = broadcast_object(capture_generators(self._sources), 0)  # a collective
            restore_generators(shared, self._sources)  # which draw the same on all ranks from here
        self._quiet = order.keyed_by == "none" or is_deterministic(
            loader.dataset, loader.collate_fn
        )
        self._fetcher = Fetcher(loader.dataset, loader.collate_fn, self._batched)
        self._tasks = _Tasks()
        self._generator = torch.Generator()
        in_process = loader.num_workers == 0 and not loader.pin_memory
        self._loader = None if in_process else self._rebuilt()
        self._batches: EpochBatches | None = None
        self._epoch_id: int | None = None
        self._start: Mapping[str, Any] | None = None
        """What random sources and samplers kept when the epoch began."""
        self._loaded: Mapping[str, Any] | None = None
        """The state that the next epoch goes on from."""

    def epoch(self, seed: int, epoch_id: int, step_id: int) -> Iterator[Any]:
        """The batches of an epoch from a step on."""
        loaded, self._loaded = self._loaded, None
        self._start = self._kept()  # first: a dataset may draw when it is told
        set_epoch_of(self._user, epoch_id)
        if loaded is not None and step_id > 0:
            self._check_described(loaded, _DESCRIBED)
        self._epoch_id = epoch_id
        self._batches = self._epoch_batches(seed, epoch_id, loaded if step_id > 0 else None)
        tasks = self._epoch_tasks(self._batches, seed, epoch_id, step_id)
        if self._loader is None:
            return map(self._fetcher.__getitem__, tasks)
        self._tasks.current = tasks
        self._fetcher.epoch_id = epoch_id  # as the dataset knows, which workers get as it is
        self._generator.manual_seed(epoch_seed(seed, epoch_id, RngStream.WORKERS))
        with worker_startup():
            return iter(self._loader)

    @property
    def steps_per_epoch(self) -> int | None:
        """Of this process in the epoch that the run is in; None where it is not known."""
        if self._batches is not None and self._epoch_id == self._progress.epoch_id:
            return self._batches.steps
        samples = self._samples()
        if samples is not None:
            return self._division().steps(samples)
        batches = count_batches(self._made_of)
        if batches is None or self._share.processes == 1:
            return batches
        return self._iterated(0).steps

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """How many samples the steps have from one on, of the epoch begun."""
        return None if self._batches is None else self._batches.sizes(step_id, ahead)

    def batch_indices(self, step_id: int) -> BatchIndices | None:
        """What the batch of a step is made of; None where there is none."""
        return None if self._batches is None else self._batches.at_step(step_id)

    def state(self) -> Mapping[str, Any]:
        """What the rest of the epoch follows from, beside the seed."""
        progress = self._progress
        if self._loaded is not None:
            return self._loaded
        begun = self._batches if self._epoch_id == progress.epoch_id else None
        kept = self._start if begun is not None else None
        return {
            **self._description(),
            "samples": begun.samples_before(progress.step_id) if begun is not None else 0,
            **(self._kept() if kept is None else kept),
        }

    def _kept(self) -> dict[str, Any]:
        """What the order of the epochs to come follows from, where it is not the seed alone."""
        return {"random": capture_generators(self._sources), "samplers": self._samplers.capture()}

    def rank_state(self) -> dict[str, Any]:
        """Nothing: the order is that of the whole job."""
        return {}

    def check(
        self, state: Mapping[str, Any], rank_state: Mapping[str, Any], within_epoch: bool
    ) -> None:
        """Refuse what :meth:`load` could not go on from; raises ``StateError``."""
        check_generators(state["random"], self._sources)
        here = self._description()
        lengths_may_change = hasattr(self._user.dataset, "set_epoch")  # when it is told the epoch
        self._check_described(state, ["sampler"] if lengths_may_change else list(_DESCRIBED))
        if within_epoch and state["batches_per_step"] != here["batches_per_step"]:
            raise StateError(
                f"a step had {state['batches_per_step']} batches of the whole job when the run "
                f"was saved, and has {here['batches_per_step']}; with a batch sampler of your "
                "own, the number of processes can't change within an epoch"
            )
        saved, now = state["samples_per_step"], here["samples_per_step"]
        if not within_epoch or saved == now:
            return
        if not self._order.allow_other_batch_size:
            raise StateError(
                f"a step had {saved} samples of the whole job when the run was saved, and has "
                f"{now}: within an epoch, {self._as_many_samples(saved)}, or allow another number "
                "with DataOrder(allow_other_batch_size=True)"
            )
        if saved is None or now is None or self._sampler is None or not is_builtin(self._sampler):
            raise StateError(
                f"a step had {saved} samples of the whole job when the run was saved, and has "
                f"{now}; within an epoch, the batch size can change only where the sampler is "
                "one of torch's"
            )

    def _as_many_samples(self, saved: int | None) -> str:
        """What to do to have as many samples in a step as there were."""
        processes = 1 if self._share.split else self._share.processes
        if saved is None or saved % processes:
            return f"give it as many, which {processes} processes can't have"
        return f"give the loader batch_size={saved // processes}, as many as it had"

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Have the next epoch begin, and go on, as the saved run would have."""
        restore_generators(state["random"], self._sources)
        self._samplers.restore(state.get("samplers", {}))
        self._loaded = state
        self._batches = self._start = self._epoch_id = None

    def _check_described(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        here = self._description()
        for name in names:
            if state[name] != here[name]:
                raise StateError(
                    f"the data had {_DESCRIBED[name]} {state[name]} when it was saved, and has "
                    f"{here[name]}, which is another order of samples; give it what it had"
                )

    def _description(self) -> dict[str, Any]:
        sampler = self._made_of if self._sampler is None else self._sampler
        own_batches = self._batched and not self._listed
        return {
            "sampler": type(sampler).__qualname__,
            "dataset_length": count_batches(self._user.dataset),
            "sampler_length": count_batches(sampler),
            "samples_per_step": None if own_batches else self._division().samples_per_step,
            "batches_per_step": self._share.processes if own_batches else 1,
        }

    def _samples(self) -> int | None:
        """How many an epoch has, where batches are made of samples by torch's batch sampler."""
        if self._sampler is not None:
            return count_batches(self._sampler)
        return None if self._batched else count_batches(self._made_of)

    def _division(self) -> StepPartition:
        share, batches = self._share, self._made_of
        if type(batches) is not BatchSampler:
            return StepPartition(1, processes=share.processes, rank=share.rank)
        size = batches.batch_size // share.processes if share.split else batches.batch_size
        return StepPartition(size, batches.drop_last, share.processes, share.rank)

    def _epoch_batches(
        self, seed: int, epoch_id: int, loaded: Mapping[str, Any] | None
    ) -> EpochBatches:
        if self._user.generator is not None:
            # A plain loader draws the seed of its workers first, also where it has none.
            torch.empty((), dtype=torch.int64).random_(generator=self._user.generator)
        sampler = self._made_of if self._sampler is None else self._sampler
        division = self._division()
        if not is_builtin(sampler):
            return self._iterated(epoch_seed(seed, epoch_id, RngStream.ORDER))
        order = sampler_order(sampler, epoch_generator(seed, epoch_id, RngStream.ORDER))
        first_step = first_sample = 0
        if loaded is not None:
            first_step, first_sample = self._progress.step_id, loaded["samples"]
            self._tell_another_batch_size(loaded, division)
        return IndexedBatches(order, division, self._listed, first_step, first_sample)

    def _tell_another_batch_size(self, loaded: Mapping[str, Any], division: StepPartition) -> None:
        before, now, done = loaded["samples_per_step"], division.samples_per_step, loaded["samples"]
        if before != now:
            logger.warning(
                "the epoch goes on with %d samples a step, where it had %d, from sample %d on, "
                "%s; so it has another number of steps than other epochs",
                *(now, before, done),
                "where a step of other epochs begins, too"
                if done % now == 0
                else "where no step of other epochs begins",
            )

    def _iterated(self, key: int) -> IteratedBatches:
        return IteratedBatches(
            self._made_of,
            self._division(),
            None if self._sampler is None else count_batches(self._sampler),
            PersistentRng(key),
            self._progress,
            batched=self._batched or self._listed,
            joined=self._listed,
            split=self._share.split,
        )

    def _epoch_tasks(
        self, batches: EpochBatches, seed: int, epoch_id: int, step_id: int
    ) -> Iterator[Task]:
        given = batches.from_step(step_id)
        if self._quiet:
            return (Task(epoch_id, batch[0], batch[2], None, None) for batch in given)
        key = epoch_seed(seed, epoch_id, RngStream.LOADING)
        if self._order.keyed_by == "batch":
            return (
                Task(epoch_id, batch_id, indices, indexed_seed(key, batch_id), None)
                for batch_id, _, indices, _ in given
            )
        collating = epoch_seed(seed, epoch_id, RngStream.COLLATING)
        return (
            Task(
                epoch_id,
                batch_id,
                indices,
                indexed_seed(collating, numbers[0]),
                [indexed_seed(key, number) for number in numbers],
            )
            for batch_id, numbers, indices, _ in given
        )

    def _rebuilt(self) -> DataLoader[Any]:
        """The user's loader, but of tasks."""
        return copy_loader(
            self._user,
            dataset=self._fetcher,
            batch_size=None,
            sampler=self._tasks,
            collate_fn=identity,
            worker_init_fn=WorkerInit(self._user.worker_init_fn),
            generator=self._generator,
            in_order=True,
        )


_DESCRIBED = {
    "sampler": "the sampler",
    "dataset_length": "a dataset of length",
    "sampler_length": "a sampler of length",
}


class _Tasks:
    """A sampler of the tasks of one epoch after another."""

    def __init__(self) -> None:
        self.current: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.current
