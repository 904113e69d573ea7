"""What a trainer iterates: the user's loader, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from robo_orchard_lab.pipeline.data.loader import find_batch_shard, is_map_style, unwrap_loader
from robo_orchard_lab.pipeline.data.map_data import MapData
from robo_orchard_lab.pipeline.data.order import DataOrder, StepSizes
from robo_orchard_lab.pipeline.data.stream_data import StreamData
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress

STATE_VERSION = 1


class TrainingData:
    """Batches in an order that follows from (seed, epoch), and can be begun anywhere.

    ::

        data = TrainingData(dataloader, DataOrder(seed=7), accelerator, progress)
        data.load_state_dict(state, rank_state)              # where a run is resumed
        for batch in data.epoch(progress.epoch_id, progress.step_id):
            ...
            progress.finish_step()
            state, rank_state = data.state_dict(), data.rank_state_dict()

    A ``DataLoader`` with an index is rebuilt around its own dataset, ``collate_fn``,
    ``worker_init_fn`` and options. A sampler without a generator draws its order from
    (seed, epoch); one that has a generator gives the order of a plain torch loop without
    persistent workers. What is drawn while loading, by torch (CPU), NumPy and Python, is keyed by
    (seed, epoch, batch), or by sample, the same in workers and in this process; what the process
    itself draws is as if loading drew nothing.

    With several processes, a step of data with an index has the samples that one process with a
    batch that many times as large would have; each process has the next part of them, as even as
    can be, and none is repeated, whatever ``even_batches`` says. A process that has no part in the
    last step is given another's sample: a filler. The batches of a batch sampler of one's own are
    dealt out whole. A loader of data with an index gives batches on the CPU, also where Accelerate
    has prepared it.

    Args:
        dataloader: the user's.
        order: what the order follows from.
        accelerator: the processes, and how Accelerate is asked to divide batches among them.
        progress: what the run has done; moved by the trainer, read here.

    Raises:
        PipelineConfigError: the loader can't be given an order, or be divided.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        order: DataOrder,
        accelerator: Accelerator,
        progress: TrainerProgress,
    ) -> None:
        self.dataloader = dataloader
        self.order = order
        self._progress = progress
        self.seed = _common_seed(order, accelerator)
        """What the order follows from: that of ``order``, of torch, or of the run resumed."""
        loader = unwrap_loader(dataloader, accelerator)
        share = find_batch_shard(loader, accelerator)
        self._source: MapData | StreamData
        if isinstance(loader, DataLoader) and is_map_style(loader):
            self.num_processes = share.processes
            """How many have samples of their own in a step."""
            self._source = MapData(loader, order, share, progress)
        else:
            self.num_processes = accelerator.num_processes
            self._source = StreamData(loader, order, share, progress, self.num_processes)

    def epoch(self, epoch_id: int, step_id: int = 0) -> Iterator[Any]:
        """This process's batches of an epoch, from a step on.

        Samplers and datasets with a ``set_epoch`` are told the epoch before.
        """
        return self._source.epoch(self.seed, epoch_id, step_id)

    @property
    def steps_per_epoch(self) -> int | None:
        """How many batches this process has in the epoch that the run is in; None: not known."""
        return self._source.steps_per_epoch

    def __len__(self) -> int:
        steps = self.steps_per_epoch
        if steps is None:
            raise TypeError("the training data has no length: its sampler or dataset has none")
        return steps

    def step_sizes(self, step_id: int, *, ahead: bool) -> Iterator[StepSizes] | None:
        """How many samples the steps have, from one of the begun epoch on.

        Args:
            step_id: the first one.
            ahead: whether that of a step is asked for before its batch was given.

        Returns:
            None where only looking into the batches tells.
        """
        return self._source.sizes(step_id, ahead)

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """Of the samples in the batch of the current step: their places in the epoch's order.

        They count from 0 the samples of the whole job in the epoch. Empty for a filler; None where
        samples have no numbers.
        """
        batch = self._source.batch_indices(self._progress.step_id)
        if batch is None:
            return None
        return [] if batch.is_padding_step else batch.numbers

    @property
    def sample_indices(self) -> Any:
        """What the batch of the current step was loaded by: a list of the dataset's indices.

        One index where the dataset makes whole batches; empty for a filler; None where there are
        no indices.
        """
        batch = self._source.batch_indices(self._progress.step_id)
        if batch is None:
            return None
        return [] if batch.is_padding_step else batch.indices

    def state_dict(self) -> dict[str, Any]:
        """Where the whole job is in its data; of plain values and tensors, alike on all ranks."""
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
        """What is this rank's own: the state of a loader or dataset that can save its own."""
        return dict(self._source.rank_state())

    def check(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Refuse a state that the data can't go on from; changes nothing.

        Raises:
            StateError: it is of another order; the message says what was saved, what there is
                and what to change.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"the data's state has version {state.get('version')!r}, this one reads "
                f"{STATE_VERSION}; resume with the release that wrote it"
            )
        if state["kind"] != self._source.kind:
            raise StateError(
                f"the data was {state['kind']} when it was saved, and is {self._source.kind}; "
                "give the same kind of loader"
            )
        if self.order.seed is not None and self.order.seed != state["seed"]:
            raise StateError(
                f"the data's order followed from seed {state['seed']} when it was saved, and "
                f"DataOrder has seed={self.order.seed}; give the same one, or None to take over "
                "the saved one"
            )
        if self.order.keyed_by != state["keyed_by"]:
            raise StateError(
                f"randomness while loading was keyed by {state['keyed_by']} when the run was "
                f"saved, and DataOrder has keyed_by={self.order.keyed_by!r}; give the same"
            )
        self._source.check(state, rank_state, within_epoch=state["step_id"] > 0)

    def load_state_dict(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Have the epoch that was saved go on, or the next one begin, as they would have."""
        self.seed = state["seed"]
        self._source.load(state, rank_state)


def _common_seed(order: DataOrder, accelerator: Accelerator) -> int:
    """The first rank's."""
    seed = torch.initial_seed() % 2**64 if order.seed is None else order.seed
    if accelerator.num_processes == 1:
        return seed
    return int(broadcast_object(seed, 0))  # a collective
