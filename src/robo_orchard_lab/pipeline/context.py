"""Arguments that every hook receives: the run, its counters, and the scope's own fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import torch
from accelerate import Accelerator

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    SimpleBatchProcessor,
    count_batches,
    count_samples,
)
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.failure_watch import report_failure
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
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
    from torch.optim.lr_scheduler import LRScheduler

    from robo_orchard_lab.pipeline.batch_processor import LossWeighting
    from robo_orchard_lab.pipeline.data import TrainingData

_STEP_CHANNELS: tuple[ChannelName, ...] = (
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
)
_UPDATE_CHANNELS: tuple[ChannelName, ...] = ("on_optimizer_step", "on_step")
_BACKING_FIELD = {
    "loss": "attached_loss",
    "batch_size": "batch",
    "is_padding_step": "loss_divisor",
    "loss_weight": "given_loss_weight",
    "sample_numbers": "batch",
    "sample_indices": "batch",
}
"""Field behind each property that is valid in some channels only."""


def _valid_in(channels: tuple[ChannelName, ...]) -> dict[str, tuple[ChannelName, ...]]:
    return {"channels": channels}


class WeightSet(Protocol):
    """Alternative weights of the model, such as an exponential moving average."""

    def applied(self) -> AbstractContextManager[None]:
        """Return a context manager that swaps these weights into the model."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name, in the layout of the model's ``state_dict``."""
        ...


class Snapshot(NamedTuple):
    """State of a run at a commit point; tensors are references, not copies."""

    parts: Mapping[str, Any]
    """State shared by all ranks, by the name of its file."""
    of_rank: Mapping[str, Any]
    """State of this rank."""
    about: Mapping[str, Any]
    """Metadata for people: counters, configuration, command, versions."""


def _no_snapshot() -> Snapshot:
    raise PipelineStateError("a run without a trainer has no snapshot; create a HookBasedTrainer")


@dataclass(slots=True, eq=False, repr=False)
class PipelineRun:
    """Objects of one run that all scopes share; hooks reach the run as ``args.run``.

    The trainer creates the run. :meth:`standalone` creates a run without a trainer.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    batch_processor: BatchProcessor
    limits: TrainerLimits
    progress: TrainerProgress
    metrics: MetricsBoard
    agreement: Agreement
    requests: Requests
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: LRScheduler | None = None
    dataloader: Iterable[Any] = ()
    data: TrainingData | None = None
    """Batches of :attr:`dataloader` in their order; None in a run without a trainer."""
    folder: Path | None = None
    """Run folder for the files of hooks, or None."""
    state_file: RunStateFile = field(default_factory=RunStateFile)
    """Writer of run_state.json; writes nothing in a run without a folder."""

    # Registries: hooks add themselves under their names when the loop begins.
    evaluations: dict[str, Callable[[PipelineHookArgs], None]] = field(default_factory=dict)
    """Function that executes an evaluation, by hook name."""
    evaluated_loaders: dict[str, str] = field(default_factory=dict)
    """Name of the hook that evaluates a loader, by loader name."""
    weight_sets: dict[str, WeightSet] = field(default_factory=dict)
    """Alternative weights to evaluate and to save, by hook name."""
    savers: dict[str, Callable[[Sequence[Request]], None]] = field(default_factory=dict)
    """Function that writes a checkpoint for a list of requests, by hook name."""
    failures: list[Exception] = field(default_factory=list)
    """Errors of background work; the trainer raises the first error at the end of the run."""

    take_snapshot: Callable[[], Snapshot] = _no_snapshot
    """Function that collects the state for a checkpoint. All ranks call it at a commit point."""
    should_defer_saves: Callable[[], bool] = lambda: False
    """Function that returns True within an accumulation window of a sharded model, until whose end
    saves and stops wait."""
    count_samples: Callable[[Any], int] = count_samples
    """Function that counts the samples of a batch; the batch processor's method where defined."""
    commit_seconds: float = 0.0
    """Total time in evaluations, logging points and saves, in seconds."""

    def __post_init__(self) -> None:
        self.count_samples = getattr(self.batch_processor, "count_samples", self.count_samples)

    @classmethod
    def standalone(
        cls,
        *,
        accelerator: Accelerator | None = None,
        model: torch.nn.Module | None = None,
        batch_processor: BatchProcessor | None = None,
        limits: TrainerLimits | None = None,
        dataloader: Iterable[Any] = (),
    ) -> PipelineRun:
        """Create a run without a trainer, to call hooks in tests, examples and evaluations.

        Args:
            accelerator: defaults to ``Accelerator()``.
            model: defaults to ``torch.nn.Identity()``.
            batch_processor: defaults to a processor that returns the model's outputs, no loss.
            limits: defaults to one epoch.
            dataloader: batches; empty by default.
        """
        progress, agreement = TrainerProgress(), Agreement()
        return cls(
            accelerator=Accelerator() if accelerator is None else accelerator,
            model=torch.nn.Identity() if model is None else model,
            batch_processor=_FORWARD_ONLY if batch_processor is None else batch_processor,
            limits=TrainerLimits(max_epoch=1) if limits is None else limits,
            progress=progress,
            metrics=MetricsBoard(progress),
            agreement=agreement,
            requests=Requests(agreement),
            dataloader=dataloader,
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps in an epoch on this rank; None for data without a length."""
        return count_batches(self.dataloader) if self.data is None else self.data.steps_per_epoch

    def weight_set(self, name: str) -> WeightSet:
        """Return the weights that a hook keeps.

        Raises:
            PipelineConfigError: no hook of that name keeps weights; the message lists those that
                do.
        """
        if name not in self.weight_sets:
            hint = suggest_name(name, list(self.weight_sets), "hooks that keep weights:")
            raise PipelineConfigError(
                f"no hook named {name!r} keeps weights; {hint}"
                + ("" if self.weight_sets else "; register an EMA")
            )
        return self.weight_sets[name]


_FORWARD_ONLY = SimpleBatchProcessor.from_callable(
    lambda model, batch: (model(batch), None), need_backward=False
)


@dataclass(slots=True, eq=False, repr=False)
class PipelineHookArgs:
    """Argument of every hook: one object for each scope of work.

    All channels of a step share one object; the loop, each epoch and each evaluation have their
    own. Hooks read the fields, and may change the contents of the batch and the model's weights.
    Counters show the value at the time of reading. A field that is valid in some channels only
    has its default in the others; see :meth:`channels_of`.
    """

    run: PipelineRun = field(default_factory=PipelineRun.standalone)
    """Objects that all scopes share; the properties below read them."""
    batch: Any = field(default=None, metadata=_valid_in(_STEP_CHANNELS))
    """Batch, on the accelerator's device."""
    at_accumulation_boundary: bool = field(default=False, metadata=_valid_in(_STEP_CHANNELS))
    """True if this step ends an accumulation window, so that an optimizer step is due."""
    loss_divisor: float = field(default=1.0, metadata=_valid_in(_STEP_CHANNELS))
    """Divisor of the loss in the backward pass: the samples of the accumulation window, averaged
    over the ranks, divided by the samples of this batch. Infinite in a padding step."""
    model_outputs: Any = field(default=None, metadata=_valid_in(_STEP_CHANNELS))
    """Outputs of the batch processor; None until the forward pass is done."""
    attached_loss: torch.Tensor | None = field(default=None, metadata=_valid_in(_STEP_CHANNELS))
    """Loss with its autograd graph, for the backward pass; hooks read :attr:`loss`."""
    given_loss_weight: torch.Tensor | None = field(default=None, metadata=_valid_in(_STEP_CHANNELS))
    """Weight that the batch processor returned with the loss, on the device; hooks read
    :attr:`loss_weight`."""
    loss_weighting: LossWeighting | None = field(default=None, metadata=_valid_in(_UPDATE_CHANNELS))
    """Scaling of the window's gradients for losses with weights; None without weights, and for a
    window of one batch on one rank."""
    grad_norm: torch.Tensor | None = field(default=None, metadata=_valid_in(_UPDATE_CHANNELS))
    """Norm of all gradients before clipping, on their device; None until a hook computes it."""
    grad_norm_order: float | None = field(default=None, metadata=_valid_in(_UPDATE_CHANNELS))
    """Order of :attr:`grad_norm`, such as 2."""
    gradients_changed: bool = field(default=False, metadata=_valid_in(_UPDATE_CHANNELS))
    """True if a ``before`` of ``on_optimizer_step`` changed the gradients after :attr:`grad_norm`
    was computed, as clipping does. The hook that changes them sets this."""
    skip_reason: str | None = field(default=None, metadata=_valid_in(_UPDATE_CHANNELS))
    """Reason to skip the optimizer step, set by a ``before`` of ``on_optimizer_step`` on every
    rank. Weights, optimizer and LR scheduler keep their state, and the gradients are dropped."""
    update_committed: bool | None = field(default=None, metadata=_valid_in(_UPDATE_CHANNELS))
    """True if the optimizer step changed the weights, False if it was skipped, None before it."""
    epoch_completed: bool = field(default=False, metadata=_valid_in(("on_epoch",)))
    """In ``after``: True if the epoch reached the end of its data."""
    evaluation: str | None = field(default=None, metadata=_valid_in(("on_evaluation",)))
    """Name of the evaluating hook."""
    exception: BaseException | None = None
    """In ``after``: the error that leaves the scope, or None."""
    _batch_size: int | None = field(default=None, init=False)

    @property
    def is_padding_step(self) -> bool:
        """True if this rank has no data for a step that other ranks have data for.

        The rank takes part with a batch of weight 0: ``batch_size`` is 0, ``sample_numbers`` is
        empty, gradients are zero, and buffers and RNG states are restored. Metrics should ignore
        ``model_outputs`` and ``loss``.
        """
        return self.loss_divisor == math.inf

    @property
    def is_filler(self) -> NoReturn:
        """Former name of :attr:`is_padding_step`; raises an AttributeError."""
        raise AttributeError("args.is_filler was renamed; read args.is_padding_step")

    @property
    def batch_size(self) -> int:
        """Number of samples of the batch on this rank; 0 in a padding step.

        Counted on first access, by the batch processor's ``count_samples(batch)`` where defined,
        else as the length of the first tensor, or 1 without a tensor.
        """
        if self._batch_size is None:
            self._batch_size = 0 if self.is_padding_step else self.run.count_samples(self.batch)
        return self._batch_size

    @property
    def loss_weight(self) -> float | torch.Tensor:
        """Weight of this batch's loss in a mean of losses, on this rank; 0 in a padding step.

        The weight that the batch processor returned, or else the number of samples.
        """
        weight = self.given_loss_weight
        return self.batch_size if weight is None else weight

    @property
    def loss(self) -> torch.Tensor | None:
        """Loss of this batch on this rank: detached, not divided, on its device.

        None until the forward pass is done. Reading the number (``.item()``) waits for the
        device.
        """
        # Detached on access: a step without such a hook saves a microsecond.
        return None if self.attached_loss is None else self.attached_loss.detach()

    @property
    def progress(self) -> TrainerProgress:
        """All counters."""
        return self.run.progress

    @property
    def epoch_id(self) -> int:
        """Epoch, from 0."""
        return self.run.progress.epoch_id

    @property
    def step_id(self) -> int:
        """Step within the epoch, from 0."""
        return self.run.progress.step_id

    @property
    def global_step_id(self) -> int:
        """Step within the run, from 0."""
        return self.run.progress.global_step_id

    @property
    def optimizer_step_id(self) -> int:
        """Number of committed optimizer steps."""
        return self.run.progress.optimizer_step_id

    @property
    def batch_processor(self) -> BatchProcessor:
        """Batch processor: computes outputs and loss of a batch."""
        return self.run.batch_processor

    @property
    def limits(self) -> TrainerLimits:
        """Limits of the run."""
        return self.run.limits

    @property
    def max_step(self) -> int | None:
        """Limit in steps, or None."""
        return self.run.limits.max_step

    @property
    def max_optimizer_step(self) -> int | None:
        """Limit in optimizer steps, or None."""
        return self.run.limits.max_optimizer_step

    @property
    def max_epoch(self) -> int | None:
        """Limit in epochs, or None."""
        return self.run.limits.max_epoch

    @property
    def accelerator(self) -> Accelerator:
        """Devices, processes and precision."""
        return self.run.accelerator

    @property
    def model(self) -> torch.nn.Module:
        """Model as prepared: on its device, wrapped in DDP for several processes."""
        return self.run.model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer that is stepped; None without a backward pass."""
        return self.run.optimizer

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler, or None."""
        return self.run.lr_scheduler

    @property
    def dataloader(self) -> Any:
        """Data loader that was passed to the trainer."""
        return self.run.dataloader

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """Positions of this rank's samples in the epoch's order, from 0, over the whole job.

        Valid in the channels of a step; empty in a padding step; None for data without positions.
        """
        if self.is_padding_step:
            return []
        return None if self.run.data is None else self.run.data.sample_numbers

    @property
    def sample_indices(self) -> Any:
        """Dataset indices of this rank's samples, as a list.

        Valid in the channels of a step; empty in a padding step; None for data without indices.
        """
        if self.is_padding_step:
            return []
        return None if self.run.data is None else self.run.data.sample_indices

    @property
    def metrics(self) -> MetricsBoard:
        """Metrics board, to publish named scalars."""
        return self.run.metrics

    @property
    def requests(self) -> Requests:
        """Requests to the trainer: save, evaluate, log, stop."""
        return self.run.requests

    def failing(self, error: BaseException) -> None:
        """Report an error to the other ranks; channels call this before any ``after``."""
        report_failure(error)

    @classmethod
    def channels_of(cls, name: str) -> tuple[ChannelName, ...]:
        """Return the channels in which a field is valid.

        >>> PipelineHookArgs.channels_of("epoch_completed")
        ('on_epoch',)
        """
        name = _BACKING_FIELD.get(name, name)
        for declared in fields(cls):
            if declared.name == name:
                channels: tuple[ChannelName, ...] = declared.metadata.get("channels", CHANNEL_NAMES)
                return channels
        if isinstance(getattr(cls, name, None), property):
            return CHANNEL_NAMES
        raise AttributeError(f"{cls.__name__} has no field {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.progress}>"
