"""Batches of a map-style dataset: a resumed run seeks its position."""

from __future__ import annotations

import weakref
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
    RngStream,
    Task,
    epoch_seed,
    is_deterministic,
    seeded_tasks,
)
from robo_orchard_lab.pipeline.data.loader import BatchShard, batches_of, set_epoch_of
from robo_orchard_lab.pipeline.data.order import (
    DataOrder,
    StepPartition,
    StepSizes,
    is_builtin,
    sampler_order,
)
from robo_orchard_lab.pipeline.data.random_generators import (
    capture_generators,
    check_generators,
    iter_samplers,
    loader_generators,
    restore_generators,
)
from robo_orchard_lab.pipeline.data.worker_batches import WorkerBatches
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Text, errors_of

logger = job_logger(__name__)

_DESCRIBED = {
    "sampler": "the sampler",
    "dataset_length": "a dataset of length",
    "sampler_length": "a sampler of length",
}
_SCALARS = (bool, int, float, str, type(None))
_MAX_NUMBERS = 2_000_000  # of a list or an array, since every checkpoint has a copy


class MapData:
    """Batches of the user's ``DataLoader``, in an order determined by seed and epoch."""

    kind = "a DataLoader of a map-style dataset"

    def __init__(
        self,
        loader: DataLoader[Any],
        order: DataOrder,
        shard: BatchShard,
        progress: TrainerProgress,
    ) -> None:
        self._user = loader
        self._order = order
        self._shard = shard
        self._progress = progress
        self._batch_source = batches_of(loader)
        self._has_torch_batches = type(self._batch_source) is BatchSampler
        self._batched = loader.batch_sampler is not None
        self._has_custom_batches = self._batched and not self._has_torch_batches
        self.has_sample_indices = self._batched or self._has_torch_batches
        """True if a batch has an index for each sample; False for one index of a complete batch."""
        self._sampler = self._batch_source.sampler if self._has_torch_batches else None
        """Sampler of single samples; None if a custom batch sampler makes the batches."""
        self._index_source = self._batch_source if self._sampler is None else self._sampler
        self._generators = loader_generators(loader)
        self._sampler_state = SamplerState(loader)
        methods = hasattr(loader.dataset, "state_dict"), hasattr(loader.dataset, "load_state_dict")
        self._stateful: Any = loader.dataset if all(methods) else None
        if shard.processes > 1 and self._generators:
            first = broadcast_object(capture_generators(self._generators), 0)  # a collective
            restore_generators(first, self._generators)  # now equal on all ranks
        self._skips_seeding = order.keyed_by == "none" or is_deterministic(
            loader.dataset, loader.collate_fn
        )
        self._fetcher = Fetcher(loader.dataset, loader.collate_fn, self._batched)
        self._workers: WorkerBatches | None = None
        if loader.num_workers > 0 or loader.pin_memory:
            self._workers = WorkerBatches(loader, self._fetcher)
        self._batches: EpochBatches | None = None
        self._epoch_id: int | None = None
        self._epoch_start: Mapping[str, Any] | None = None
        """State of generators and samplers when the epoch began."""
        self._epoch_description: Mapping[str, Any] = {}
        """Lengths when the epoch began, by which its order was made."""
        self._loaded: Mapping[str, Any] | None = None
        """State that the next epoch resumes from."""

    def epoch(
        self, seed: int, epoch_id: int, step_id: int, last_epoch: int | None = None
    ) -> Iterator[Any]:
        """Iterate over the batches of an epoch from a step on; load none after ``last_epoch``."""
        loaded, self._loaded = self._loaded, None
        self._epoch_start = self._source_state()  # first: set_epoch may draw random numbers
        set_epoch_of(self._user, epoch_id)
        if loaded is not None and step_id > 0:
            self._check_description(loaded, _DESCRIBED)
        self._epoch_id = epoch_id
        self._epoch_description = self._description()
        self._batches = self._epoch_batches(seed, epoch_id, loaded if step_id > 0 else None)
        tasks = self._epoch_tasks(self._batches, seed, epoch_id, step_id)
        if self._workers is None:
            return map(self._fetcher.__getitem__, tasks)
        count = None
        if isinstance(self._batches, IndexedBatches):
            count = self._batches.steps - step_id
        worker_seed = epoch_seed(seed, epoch_id, RngStream.WORKERS)
        # A proxy, since the workers' loader must not be deleted in a reference cycle.
        later = MapData._later_tasks(weakref.proxy(self), seed, epoch_id + 1, last_epoch)
        return self._workers.epoch(epoch_id, worker_seed, tasks, count, later)

    def _later_tasks(self, seed: int, epoch_id: int, last_epoch: int | None) -> Iterator[Task]:
        """Yield the tasks of later epochs, if neither a generator nor the dataset changes them."""
        sampler, dataset = self._index_source, self._user.dataset
        is_known = (
            is_builtin(sampler)
            and not self._has_custom_batches
            and getattr(sampler, "generator", None) is self._user.generator is None
            and not hasattr(dataset, "set_epoch")
            and self._stateful is None
        )
        while is_known and (last_epoch is None or epoch_id <= last_epoch):
            batches = self._indexed_batches(seed, epoch_id)
            yield from self._epoch_tasks(batches, seed, epoch_id, 0)
            is_known = bool(batches.steps)
            epoch_id += 1

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps of the current epoch; None if unknown."""
        if self._batches is not None and self._epoch_id == self._progress.epoch_id:
            return self._batches.steps
        samples = self._count_samples()
        if samples is not None:
            return self._partition().steps(samples)
        batches = count_batches(self._batch_source)
        if batches is None or self._shard.processes == 1:
            return batches
        return self._iterated_batches(0).steps

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        return None if self._batches is None else self._batches.sizes(step_id, ahead)

    def batch_indices(self, step_id: int) -> BatchIndices | None:
        return None if self._batches is None else self._batches.at_step(step_id)

    def sample_count(self, step_id: int) -> int | None:
        return None if self._batches is None else self._batches.local_size(step_id)

    def state(self) -> Mapping[str, Any]:
        """Return the position of all processes in the epoch; equal on all ranks."""
        own = {} if self._stateful is None else {"dataset": self._stateful.state_dict()}
        if self._loaded is not None:
            return {**self._loaded, **own}
        has_begun = self._epoch_id == self._progress.epoch_id
        batches = self._batches if has_begun else None
        start = self._epoch_start if batches is not None else None
        return {
            **own,
            **(self._description() if batches is None else self._epoch_description),
            "samples": 0 if batches is None else batches.samples_before(self._progress.step_id),
            **(self._source_state() if start is None else start),
        }

    def rank_state(self) -> dict[str, Any]:
        """Return an empty state: all ranks have equal positions."""
        return {}

    schema = StateSchema(
        optional=["dataset"],
        dataset=Any,
        sampler=Text,
        dataset_length=Count | None,
        sampler_length=Count | None,
        samples_per_step=Count | None,
        batches_per_step=Count,
        samples=Count | None,
        random=dict[str, Any],
        samplers=dict[str, Any],
    )

    def check(
        self, state: Mapping[str, Any], rank_state: Mapping[str, Any], within_epoch: bool
    ) -> None:
        """Raise ``StateError`` if the data differs from the saved data; changes nothing."""
        check_generators(state["random"], self._generators)
        self._sampler_state.check(state["samplers"])
        length, samples = state["sampler_length"], state["samples"]
        is_known = None not in (length, samples, state["samples_per_step"])
        if is_known and samples > length:
            raise StateError(f"data.samples: expected at most {length}, found {samples}")
        if "dataset" in state and self._stateful is None:
            raise StateError(
                f"the dataset's own state was saved, but {type(self._user.dataset).__qualname__} "
                "has no state_dict and load_state_dict to restore it; pass the saved dataset"
            )
        # Both may change the length of the dataset.
        is_known_later = "dataset" in state or hasattr(self._user.dataset, "set_epoch")
        self._check_description(state, ["sampler"] if is_known_later else list(_DESCRIBED))
        if not within_epoch:
            return
        here = self._description()
        if state["batches_per_step"] != here["batches_per_step"]:
            raise StateError(
                f"a step had {state['batches_per_step']} batches of all processes when the run was "
                f"saved, and has {here['batches_per_step']}; with a custom batch sampler, resume "
                "within an epoch with the same world size"
            )
        saved, now = state["samples_per_step"], here["samples_per_step"]
        if saved == now:
            return
        changed = f"a step had {saved} samples when the run was saved, and has {now}; "
        if not self._order.allow_other_batch_size:
            processes = 1 if self._shard.split else self._shard.processes
            advice = f"use a world size that divides {saved} samples, not {processes}"
            if saved is not None and saved % processes == 0:
                advice = f"give the loader batch_size={saved // processes}"
            raise StateError(
                f"{changed}within an epoch, {advice}, or set DataOrder(allow_other_batch_size=True)"
            )
        if saved is None or now is None or self._sampler is None or not is_builtin(self._sampler):
            raise StateError(
                f"{changed}within an epoch, the batch size can change only with one of torch's "
                "samplers"
            )

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Make the next epoch resume from a state."""
        restore_generators(state["random"], self._generators)
        self._sampler_state.restore(state.get("samplers", {}))
        if "dataset" in state:
            with errors_of(f"the dataset's {type(self._stateful).__qualname__}"):
                self._stateful.load_state_dict(state["dataset"])
        self._loaded = state
        self._batches = self._epoch_start = self._epoch_id = None

    def _source_state(self) -> dict[str, Any]:
        return {
            "random": capture_generators(self._generators),
            "samplers": self._sampler_state.capture(),
        }

    def _check_description(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        here = self._description()
        for name in names:
            if state[name] != here[name]:
                raise StateError(
                    f"the data had {_DESCRIBED[name]} {state[name]} when the run was saved, and "
                    f"has {here[name]}, which changes the order of samples; restore the saved one, "
                    "or grow a dataset between epochs only, with state_dict and load_state_dict"
                )

    def _description(self) -> dict[str, Any]:
        return {
            "sampler": type(self._index_source).__qualname__,
            "dataset_length": count_batches(self._user.dataset),
            "sampler_length": count_batches(self._index_source),
            "samples_per_step": None
            if self._has_custom_batches
            else self._partition().samples_per_step,
            "batches_per_step": self._shard.processes if self._has_custom_batches else 1,
        }

    def _count_samples(self) -> int | None:
        """Return the samples of an epoch; None if unknown or with a custom batch sampler."""
        if self._sampler is not None:
            return count_batches(self._sampler)
        return None if self._batched else count_batches(self._batch_source)

    def _partition(self) -> StepPartition:
        shard, batches = self._shard, self._batch_source
        if not self._has_torch_batches:
            return StepPartition(1, processes=shard.processes, rank=shard.rank)
        size = batches.batch_size // shard.processes if shard.split else batches.batch_size
        return StepPartition(size, batches.drop_last, shard.processes, shard.rank)

    def _epoch_batches(
        self, seed: int, epoch_id: int, loaded: Mapping[str, Any] | None
    ) -> EpochBatches:
        if self._user.generator is not None:
            # A plain loader draws the seed of its workers first, even without workers.
            torch.empty((), dtype=torch.int64).random_(generator=self._user.generator)
        if self._has_custom_batches or not is_builtin(self._index_source):
            return self._iterated_batches(epoch_seed(seed, epoch_id, RngStream.ORDER))
        return self._indexed_batches(seed, epoch_id, loaded)

    def _indexed_batches(
        self, seed: int, epoch_id: int, loaded: Mapping[str, Any] | None = None
    ) -> IndexedBatches:
        partition = self._partition()
        order_seed = epoch_seed(seed, epoch_id, RngStream.ORDER)
        order = sampler_order(self._index_source, torch.Generator().manual_seed(order_seed))
        first_step = first_sample = 0
        if loaded is not None:
            first_step, first_sample = self._progress.step_id, loaded["samples"]
            before, now = loaded["samples_per_step"], partition.samples_per_step
            if before != now:
                logger.warning(
                    "the epoch resumes with %d samples a step instead of %d, at sample %d, which "
                    "is %s of other epochs; its number of steps differs from other epochs",
                    *(now, before, first_sample),
                    "the start of a step" if first_sample % now == 0 else "within a step",
                )
        return IndexedBatches(order, partition, self._has_torch_batches, first_step, first_sample)

    def _iterated_batches(self, seed: int) -> IteratedBatches:
        return IteratedBatches(
            self._batch_source,
            self._partition(),
            None if self._sampler is None else count_batches(self._sampler),
            seed,
            self._progress,
            batched=self.has_sample_indices,
            merge=self._has_torch_batches,
            split=self._shard.split,
        )

    def _epoch_tasks(
        self, batches: EpochBatches, seed: int, epoch_id: int, step_id: int
    ) -> Iterator[Task]:
        keyed_by = "none" if self._skips_seeding else self._order.keyed_by
        return seeded_tasks(batches.from_step(step_id), seed, epoch_id, keyed_by)


def _check_batches(state: Mapping[str, Any]) -> None:
    flat, lengths = state["flat"], state["lengths"]
    is_valid = flat.dim() == lengths.dim() == 1 and flat.dtype == lengths.dtype == torch.int64
    if not is_valid or (lengths < 0).any() or lengths.sum() != len(flat):
        raise ValueError("expected indices, and their numbers in each batch")


_BATCHES = StateSchema(then=_check_batches, flat=torch.Tensor, lengths=torch.Tensor)


class SamplerState:
    """Attributes of custom samplers changed by iteration, for example an epoch counter.

    Supported are scalars, strings, tensors, arrays, and lists of numbers or of index lists. An
    attribute that keeps its initial value is configuration, which may change before a resume.
    """

    def __init__(self, dataloader: Any) -> None:
        self._samplers = {
            path: sampler
            for path, sampler in iter_samplers(dataloader)
            if type(sampler) is not BatchSampler and not is_builtin(sampler)
        }
        self._initial = dict(self._attributes())

    def capture(self) -> dict[str, Any]:
        """Return the changed attributes by path."""
        return {
            path: value
            for path, value in self._attributes()
            if path not in self._initial or not _equal(value, self._initial[path])
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise a ``StateError`` if :meth:`restore` would add attributes or change their types."""
        live = dict(self._attributes())
        for path, value in state.items():
            if path.rpartition(".")[0] in self._samplers and path not in live:
                raise StateError(f"data.samplers: the sampler has no attribute {path!r:.80}")
            if isinstance(value, dict):
                _BATCHES.check(value, f"data.samplers.{path}")
            elif not isinstance(value, (*_SCALARS, torch.Tensor)):
                raise StateError(f"data.samplers.{path}: expected plain data, found {value!r:.60}")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the attributes of a captured state."""
        for path, value in state.items():
            sampler_path, _, attribute = path.rpartition(".")
            sampler = self._samplers.get(sampler_path)
            if sampler is not None:
                _restore_attribute(sampler, attribute, value)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for path, sampler in self._samplers.items():
            for attribute, value in list(getattr(sampler, "__dict__", {}).items()):
                for plain in _plain_copy(value):
                    yield f"{path}.{attribute}", plain


def _plain_copy(value: Any) -> tuple[Any, ...]:
    """Return a copy that a checkpoint can hold, in a tuple; an empty one for other values."""
    if type(value) in _SCALARS:
        return (value,)
    if isinstance(value, torch.Tensor):
        return (value.detach().clone(),) if value.numel() <= _MAX_NUMBERS else ()
    if type(value) is list and value and set(map(type, value)) == {list}:
        flat = [index for batch in value for index in batch]
        if len(flat) > _MAX_NUMBERS or not all(type(index) is int for index in flat):
            return ()
        lengths = torch.tensor(list(map(len, value)))
        return ({"flat": torch.tensor(flat, dtype=torch.int64), "lengths": lengths},)
    if type(value) is list and value and len(value) <= _MAX_NUMBERS:
        kinds = set(map(type, value))
        value = np.array(value) if kinds in ({int}, {float}) else value
    if isinstance(value, np.ndarray) and value.dtype.kind in "bif" and value.size <= _MAX_NUMBERS:
        return (torch.from_numpy(value.copy()),)
    return ()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _restore_attribute(sampler: Any, attribute: str, value: Any) -> None:
    """Set an attribute, in place for lists and arrays, which other objects may share."""
    now = getattr(sampler, attribute, None)
    if isinstance(value, dict):
        value = [part.tolist() for part in value["flat"].split(value["lengths"].tolist())]
    elif isinstance(value, torch.Tensor) and isinstance(now, list):
        value = value.tolist()
    elif isinstance(value, torch.Tensor) and isinstance(now, np.ndarray):
        value = value.numpy().copy()
        if now.shape == value.shape and now.dtype == value.dtype:
            now[...] = value
            return
    if isinstance(value, list) and isinstance(now, list):
        now[:] = value
    else:
        setattr(sampler, attribute, value)
