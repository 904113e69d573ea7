"""Training data: the user's loader, in an order continued exactly by a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch.utils.data import DataLoader

from robo_orchard_lab.pipeline.batch_processor import count_samples
from robo_orchard_lab.pipeline.data.epoch_batches import BatchIndices
from robo_orchard_lab.pipeline.data.loader import find_batch_shard, is_map_style, unwrap_loader
from robo_orchard_lab.pipeline.data.map_data import MapData
from robo_orchard_lab.pipeline.data.order import DataOrder, StepSizes
from robo_orchard_lab.pipeline.data.stream_data import StreamData
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Text

STATE_VERSION = 1
_SCHEMA = StateSchema(
    STATE_VERSION,
    kind=Text,
    seed=Annotated[int, Field(strict=True, ge=0, lt=2**64)],
    keyed_by=Text,
    epoch_id=Count,
    step_id=Count,
)


class TrainingData:
    """Batches of this process, in an order determined by (seed, epoch).

    ::

        data = TrainingData(dataloader, DataOrder(seed=7), accelerator, progress)
        data.load_state_dict(state, rank_state)              # to resume a run
        for batch in data.epoch(progress.epoch_id, progress.step_id):
            ...
            progress.finish_step()
            state, rank_state = data.state_dict(), data.rank_state_dict()

    A ``DataLoader`` of a map-style dataset is rebuilt with its dataset, functions and options, also
    if Accelerate prepared the loader; batches stay on the CPU. A sampler without a generator is
    seeded by (seed, epoch), a sampler with one yields the order of a plain loop. Random numbers in
    loading are seeded as :class:`DataOrder` describes, equally in workers and in this process, and
    leave this process's RNGs unchanged.

    With several processes, a step has the samples of one process with a batch that many times as
    large, split evenly and without repeats. A process without samples in the last step gets another
    rank's sample: a padding step. Batches of a custom batch sampler are not split.

    Args:
        dataloader: the user's loader.
        order: seed and keys of random numbers.
        accelerator: processes, and Accelerate's data loader configuration.
        progress: counters of the run; read only.
        counter: the batch processor's ``count_samples``, or None.

    Raises:
        PipelineConfigError: the loader can't be reordered or divided.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        order: DataOrder,
        accelerator: Accelerator,
        progress: TrainerProgress,
        counter: Callable[[Any], int] | None = None,
    ) -> None:
        self.dataloader = dataloader
        self.order = order
        self._progress = progress
        seed = torch.initial_seed() % 2**64 if order.seed is None else order.seed
        self.seed: int = seed if accelerator.num_processes == 1 else broadcast_object(seed, 0)
        """Seed of the order, equal on all ranks: of ``order``, of torch, or of the resumed run."""
        loader = unwrap_loader(dataloader, accelerator)
        shard = find_batch_shard(loader, accelerator)
        self._source: MapData | StreamData
        self.counter = counter
        """Function that counts the samples of a loaded batch; None if the data knows its sizes."""
        if isinstance(loader, DataLoader) and is_map_style(loader):
            self.num_processes = shard.processes
            """Number of processes with different samples in a step."""
            self._source = MapData(loader, order, shard, progress)
            if not self._source.has_sample_indices:
                self.counter = counter or count_samples
        else:
            self.num_processes = accelerator.num_processes
            self._source = StreamData(
                loader, order, shard, progress, self.num_processes, counter or count_samples
            )

    def epoch(
        self, epoch_id: int, step_id: int = 0, *, last_epoch: int | None = None
    ) -> Iterator[Any]:
        """Iterate over this process's batches of an epoch, from a step on.

        Calls ``set_epoch`` of samplers and datasets first. Persistent workers load the first
        batches of later epochs ahead, up to ``last_epoch`` if given.
        """
        if isinstance(self._source, MapData):
            return self._source.epoch(self.seed, epoch_id, step_id, last_epoch)
        return self._source.epoch(self.seed, epoch_id, step_id)

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of this process's batches in the current epoch; None if unknown."""
        return self._source.steps_per_epoch

    def __len__(self) -> int:
        steps = self.steps_per_epoch
        if steps is None:
            raise TypeError("the training data has no length: its sampler or dataset has none")
        return steps

    @property
    def most_samples(self) -> int:
        """Samples of the largest batch so far, for data without indices; else 0."""
        return getattr(self._source, "most_samples", 0)

    def step_sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """Return the sizes of the current epoch's steps; None if unknown before loading.

        Args:
            step_id: first step.
            ahead: request each size before the step's batch was yielded.
        """
        return self._source.sizes(step_id, ahead)

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """Positions of the current batch's samples in the epoch's order, from 0, over all ranks.

        Empty in a padding step; None if samples have no numbers.
        """
        batch = self._current_batch()
        if batch is None:
            return None
        return [] if batch.is_padding_step else batch.numbers

    @property
    def sample_indices(self) -> Any:
        """Dataset indices of the current batch; one index if the dataset makes complete batches.

        Empty in a padding step; None if the data has no indices.
        """
        batch = self._current_batch()
        if batch is None:
            return None
        return [] if batch.is_padding_step else batch.indices

    def count_samples(self, batch: Any) -> int:
        """Return the number of samples of the current step's batch on this rank."""
        if self.counter is None or isinstance(self._source, StreamData):
            count = self._source.sample_count(self._progress.step_id)
            if count is not None:
                return count
        return (self.counter or count_samples)(batch)

    def _current_batch(self) -> BatchIndices | None:
        return self._source.batch_indices(self._progress.step_id)

    @property
    def resume_problem(self) -> str | None:
        """Reason why a checkpoint from within an epoch can't be resumed, with remedies, or None."""
        return self._source.resume_problem if isinstance(self._source, StreamData) else None

    @property
    def loads_ahead(self) -> bool:
        """True if a batch may be loaded before the update of the step before."""
        return not isinstance(self._source, StreamData) or self._source.loads_ahead

    def check_first_state(self, check: Callable[[Any], Any]) -> None:
        """Pass the own state of a loader or dataset to a function, before the next first step."""
        if isinstance(self._source, StreamData):
            self._source.check_state = check

    def state_dict(self) -> dict[str, Any]:
        """Return the position of all processes as plain values and tensors; equal on all ranks."""
        return {
            "version": STATE_VERSION,
            "kind": self._source.kind,
            "seed": self.seed,
            "keyed_by": self.order.keyed_by,
            "epoch_id": self._progress.epoch_id,
            "step_id": self._progress.step_id,
            **self._source.state(),
        }

    def rank_state_dict(self) -> dict[str, Any]:
        """Return this rank's state of a stateful loader or dataset, or an empty dict."""
        return dict(self._source.rank_state())

    def check(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Raise an error if the data can't resume from a state; changes nothing.

        Raises:
            StateError: the saved order differs; the message names both values and the remedy.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"the data's state has version {state.get('version')!r}, this release reads "
                f"{STATE_VERSION}; resume with the release that wrote it"
            )
        names = [*_SCHEMA.names, "kind"]
        _SCHEMA.check({name: state[name] for name in names if name in state}, "data")
        if state["kind"] != self._source.kind:
            raise StateError(
                f"the data was {state['kind']} when the run was saved, and is "
                f"{self._source.kind}; pass the same kind of loader"
            )
        if self.order.seed is not None and self.order.seed != state["seed"]:
            raise StateError(
                f"the data's seed was {state['seed']} when the run was saved, and DataOrder has "
                f"seed={self.order.seed}; set seed={state['seed']}, or None to use the saved seed"
            )
        if self.order.keyed_by != state["keyed_by"]:
            raise StateError(
                f"loading was keyed by {state['keyed_by']} when the run was saved, and DataOrder "
                f"has keyed_by={self.order.keyed_by!r}; set keyed_by={state['keyed_by']!r}"
            )
        self._source.schema.check({n: v for n, v in state.items() if n not in names}, "data")
        self._source.check(state, rank_state, within_epoch=state["step_id"] > 0)

    def load_state_dict(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Resume the saved epoch, or begin the next one, at the next call of :meth:`epoch`."""
        self.seed = state["seed"]
        self._source.load(state, rank_state)
