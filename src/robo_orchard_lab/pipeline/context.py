"""What hooks are given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from robo_orchard_lab.pipeline.batch_processor import count_batches, count_samples
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.sections import failing
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.progress import (
    CHANNEL_NAMES,
    ChannelName,
    TrainerLimits,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.requests import Request, Requests
from robo_orchard_lab.pipeline.run.run_state import RunStateFile

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

    from robo_orchard_lab.pipeline.batch_processor import BatchProcessor, LossWeighting
    from robo_orchard_lab.pipeline.data import TrainingData

_IN_STEP: tuple[ChannelName, ...] = (
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
)
_OF_FIELD = {
    "loss": "attached_loss",
    "batch_size": "batch",
    "is_padding_step": "loss_divisor",
    "loss_weight": "given_loss_weight",
    "sample_numbers": "batch",
    "sample_indices": "batch",
}
"""The fields that properties are made of, by the names of those."""


def _valid_in(*channels: ChannelName) -> dict[str, tuple[ChannelName, ...]]:
    return {"channels": channels}


class WeightSet(Protocol):
    """Other weights of the model than those that are trained, such as their moving average."""

    def applied(self) -> AbstractContextManager[None]:
        """The model with these weights, for the body of a ``with``; then its own again."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, as the plain model's ``state_dict`` has them."""
        ...


class Snapshot(NamedTuple):
    """All that makes up a run at a commit point; its tensors are the run's own, not copies."""

    parts: Mapping[str, Any]
    """What all ranks share, by the name of the file it goes to."""
    of_rank: Mapping[str, Any]
    """What this rank has for itself."""
    about: Mapping[str, Any]
    """Which run it is, for people: counters, configuration, command, versions."""


@dataclass(slots=True, eq=False, repr=False)
class PipelineRun:
    """What all scopes of a run share: the trainer's objects, as hooks see them."""

    progress: TrainerProgress = field(default_factory=TrainerProgress)
    metrics: MetricsBoard = None  # type: ignore[assignment]  # made below, with the progress
    requests: Requests = field(default_factory=Requests)
    agreement: Agreement = field(default_factory=Agreement)
    """What one rank finds out by itself, known to all at the same step."""
    evaluations: dict[str, Callable[[PipelineHookArgs], None]] = field(default_factory=dict)
    """What carries out an evaluation that is asked for, by the name of its hook."""
    evaluated_loaders: dict[str, str] = field(default_factory=dict)
    """The name of the hook that evaluates on a loader, by the loader's name."""
    weight_sets: dict[str, WeightSet] = field(default_factory=dict)
    """Other weights to evaluate and to save, by the name of the hook that keeps them."""
    # The trainer always sets the next four; only a run made by hand may lack them.
    batch_processor: BatchProcessor = None  # type: ignore[assignment]
    limits: TrainerLimits = None  # type: ignore[assignment]
    accelerator: Accelerator = None
    model: torch.nn.Module = None  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: LRScheduler | None = None
    dataloader: Any = None
    data: TrainingData | None = None
    """The batches of :attr:`dataloader` in their order; None in a run that is made by hand."""
    folder: Path | None = None
    """The run's own, for what it writes; None where it has none."""
    state_file: RunStateFile = field(default_factory=RunStateFile)
    """What tells those outside how the run goes; keeps no file where the run has no folder."""
    savers: dict[str, Callable[[Sequence[Request]], None]] = field(default_factory=dict)
    """What writes a checkpoint, given the requests for it, by the name of its hook."""
    take_snapshot: Callable[[], Snapshot] = None  # type: ignore[assignment]  # set by the trainer
    """What a checkpoint is to hold, for a saver; called at a commit point, on all ranks alike."""
    failures: list[Exception] = field(default_factory=list)
    """What went wrong beside the training; the trainer raises the first when it is at its end."""
    count_samples: Callable[[Any], int] = count_samples
    """How many samples a batch has; the batch processor's own method where it has one."""
    commit_seconds: float = 0.0
    """How long evaluations, logging points and saves at commit points have taken until here."""

    def __post_init__(self) -> None:
        if self.metrics is None:
            self.metrics = MetricsBoard(self.progress)  # type: ignore[unreachable]
        self.count_samples = getattr(self.batch_processor, "count_samples", self.count_samples)

    @property
    def steps_per_epoch(self) -> int | None:
        """How many steps this rank makes in an epoch; None where only its end tells."""
        return count_batches(self.dataloader) if self.data is None else self.data.steps_per_epoch

    def weight_set(self, name: str) -> WeightSet:
        """The weights that a hook keeps.

        Raises:
            PipelineConfigError: no hook of that name keeps weights; those that do are listed.
        """
        if name not in self.weight_sets:
            near = difflib.get_close_matches(name, self.weight_sets, n=1)
            raise PipelineConfigError(
                f"no hook named {name!r} keeps weights"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" Those that do: {', '.join(self.weight_sets) or 'none; register an EMA'}"
            )
        return self.weight_sets[name]


@dataclass(slots=True, eq=False, repr=False)
class PipelineHookArgs:
    """What every hook is called with: one object for one scope of work.

    All channels of a step share one object; the loop and each epoch have their own. Hooks read
    it; of what they change, only the batch's contents and the model's weights mean anything.
    The counters are those of :class:`TrainerProgress` at the time of reading, so read what you
    want to keep. A field that belongs to some channels has its default in the others;
    :meth:`channels_of` says which those are.
    """

    run: PipelineRun = field(default_factory=PipelineRun)
    """What all scopes share; the properties below read it."""
    batch: Any = field(default=None, metadata=_valid_in(*_IN_STEP))
    """The batch, on the accelerator's device."""
    at_accumulation_boundary: bool = field(default=False, metadata=_valid_in(*_IN_STEP))
    """Whether this step ends an accumulation window, so that an update is due."""
    loss_divisor: float = field(default=1.0, metadata=_valid_in(*_IN_STEP))
    """What the loss is divided by for the backward pass: the samples of the accumulation window,
    in the mean of all ranks, over those of this batch. Infinite for a filler."""
    model_outputs: Any = field(default=None, metadata=_valid_in(*_IN_STEP))
    """What the batch processor returned; set when the forward body is over."""
    attached_loss: torch.Tensor | None = field(default=None, metadata=_valid_in(*_IN_STEP))
    """The loss with its graph, for the backward pass; hooks read :attr:`loss`."""
    given_loss_weight: torch.Tensor | None = field(default=None, metadata=_valid_in(*_IN_STEP))
    """What the batch processor says that its loss weighs, on the device; hooks read
    :attr:`loss_weight`."""
    loss_weighting: LossWeighting | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """How the losses of the window were weighed, where the batch processor says what each weighs;
    None also where the window is one batch of one process."""
    grad_norm: torch.Tensor | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """The norm of all gradients ahead of clipping, on their device, from the first hook that has
    computed it in this update; None before, and where no hook does."""
    grad_norm_order: float | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """The order of :attr:`grad_norm`, such as 2."""
    gradients_changed: bool = field(
        default=False, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """Whether the gradients are no longer those that :attr:`grad_norm` was measured on; set by the
    ``before`` of ``on_optimizer_step`` that changes them, as clipping does."""
    skip_reason: str | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """Set by a ``before`` of ``on_optimizer_step``, on every rank alike, this has the update
    skipped: weights, optimizer and schedule stay as they are, and the gradients go."""
    update_committed: bool | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """Whether the update changed the weights (True) or was skipped (False); None before it."""
    epoch_completed: bool = field(default=False, metadata=_valid_in("on_epoch"))
    """In ``after``: whether the data was passed over to its end."""
    evaluation: str | None = field(default=None, metadata=_valid_in("on_evaluation"))
    """The name of the hook that evaluates."""
    exception: BaseException | None = None
    """In an ``after``: the error that is on its way out of the scope, or None."""
    _batch_size: int | None = field(default=None, init=False)

    @property
    def is_padding_step(self) -> bool:
        """Whether this rank has no data left for this step, in which other ranks have some.

        It then takes part with a batch that weighs nothing: ``batch_size`` is 0, there are no
        ``sample_numbers``, the gradients are zeros, and buffers and random states are as if it had
        not been passed through the model. ``model_outputs`` and ``loss`` are that batch's, to be
        left out of what is measured. Every rank makes the same steps.
        """
        return self.loss_divisor == math.inf

    @property
    def batch_size(self) -> int:
        """How many samples the batch has on this rank, counted when first asked for.

        The batch processor counts them where it has ``count_samples(batch)``; else it is the length
        of the first tensor in the batch, or 1 where there is none. A filler has 0.
        """
        if self._batch_size is None:
            self._batch_size = 0 if self.is_padding_step else self.run.count_samples(self.batch)
        return self._batch_size

    @property
    def loss_weight(self) -> float | torch.Tensor:
        """What the loss of this batch weighs in a mean of losses, on this rank; a filler's is 0.

        What the batch processor has returned beside it, as a tensor on its device, or else the
        samples of the batch.
        """
        weight = self.given_loss_weight
        return self.batch_size if weight is None else weight

    @property
    def loss(self) -> torch.Tensor | None:
        """This rank's loss of this batch: detached, not divided, on its device.

        Reading it as a number waits for the device. None until the forward body is over. It is
        detached when asked for, which saves a step without such a hook a microsecond.
        """
        return None if self.attached_loss is None else self.attached_loss.detach()

    @property
    def progress(self) -> TrainerProgress:
        """All counters."""
        return self.run.progress

    @property
    def epoch_id(self) -> int:
        """The epoch, from 0."""
        return self.run.progress.epoch_id

    @property
    def step_id(self) -> int:
        """The step in the epoch, from 0."""
        return self.run.progress.step_id

    @property
    def global_step_id(self) -> int:
        """The step in the run, from 0."""
        return self.run.progress.global_step_id

    @property
    def optimizer_step_id(self) -> int:
        """How many updates have been committed."""
        return self.run.progress.optimizer_step_id

    @property
    def batch_processor(self) -> BatchProcessor:
        """What turns a batch into outputs and loss."""
        return self.run.batch_processor

    @property
    def limits(self) -> TrainerLimits:
        """Where the run ends."""
        return self.run.limits

    @property
    def max_step(self) -> int | None:
        """The limit in steps, or None."""
        return self.run.limits.max_step

    @property
    def max_optimizer_step(self) -> int | None:
        """The limit in committed updates, or None."""
        return self.run.limits.max_optimizer_step

    @property
    def max_epoch(self) -> int | None:
        """The limit in epochs, or None."""
        return self.run.limits.max_epoch

    @property
    def accelerator(self) -> Accelerator:
        """Devices, processes and precision."""
        return self.run.accelerator

    @property
    def model(self) -> torch.nn.Module:
        """The model as prepared: on its device, wrapped for several processes."""
        return self.run.model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that is stepped; None where there is no backward pass."""
        return self.run.optimizer

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The schedule, or None."""
        return self.run.lr_scheduler

    @property
    def dataloader(self) -> Any:
        """What the batches come from."""
        return self.run.dataloader

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """The places of the batch's samples in the order of the epoch, from 0, on this rank.

        They count the samples of the whole job. Valid in the channels of a step; empty for a
        filler, None where the data has no numbers.
        """
        if self.is_padding_step:
            return []
        return None if self.run.data is None else self.run.data.sample_numbers

    @property
    def sample_indices(self) -> Any:
        """What the batch was loaded by: the dataset's indices, in a list, on this rank.

        Valid in the channels of a step; empty for a filler, None where the data has no indices.
        """
        if self.is_padding_step:
            return []
        return None if self.run.data is None else self.run.data.sample_indices

    @property
    def metrics(self) -> MetricsBoard:
        """Where to publish named scalars."""
        return self.run.metrics

    @property
    def requests(self) -> Requests:
        """Where to ask the trainer for something."""
        return self.run.requests

    def failing(self, error: BaseException) -> None:
        """Tell the other ranks; channels that an error leaves call it ahead of any ``after``."""
        failing(error)

    @classmethod
    def channels_of(cls, name: str) -> tuple[ChannelName, ...]:
        """The channels in which a field has a meaning.

        >>> PipelineHookArgs.channels_of("epoch_completed")
        ('on_epoch',)
        """
        name = _OF_FIELD.get(name, name)
        for declared in fields(cls):
            if declared.name == name:
                channels: tuple[ChannelName, ...] = declared.metadata.get("channels", CHANNEL_NAMES)
                return channels
        if isinstance(getattr(cls, name, None), property):
            return CHANNEL_NAMES
        raise AttributeError(f"{cls.__name__} has no field {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.progress}>"
