"""Argument that every hook receives: the run, its counters, and the scope's own fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.distributed.failure_watch import report_failure
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.media import Report
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import (
    CHANNEL_NAMES,
    ChannelName,
    TrainerLimits,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.requests import Requests

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from robo_orchard_lab.pipeline.batch_processor import LossWeighting

ArgsT = TypeVar("ArgsT")

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
    "is_padding_step": "_loss_divisor",
    "loss_weight": "_given_loss_weight",
    "losses": "attached_loss",
    "optimizer_name": "attached_loss",
    "sample_numbers": "batch",
    "sample_indices": "batch",
}
"""Field behind each property that is valid in some channels only, where the names differ."""
SKIP_TOO_LATE = (
    "args.skip_batch: expected a call before the forward pass; call it in a before of on_step or "
    "on_batch"
)
_REMEDIES = {
    "loss": "it is detached; to train on another loss, assign args.attached_loss in a before of "
    "on_model_backward",
    "at_accumulation_boundary": "set Accelerator(gradient_accumulation_steps=...); to skip an "
    "update, assign args.skip_reason in a before of on_optimizer_step",
    "loss_divisor": "to scale a loss, assign args.attached_loss in a before of on_model_backward",
    "loss_weight": "return (outputs, loss, weight) from the batch processor",
    "given_loss_weight": "return (outputs, loss, weight) from the batch processor",
    "batch_skip_reason": "call args.skip_batch(reason) in a before of on_step or on_batch",
    "batch_size": "define count_samples(batch) on the batch processor",
    "update_committed": "to skip an update, assign args.skip_reason in a before of "
    "on_optimizer_step",
    "epoch_completed": "to end the run, call args.requests.stop(...)",
    "exception": "to fail with another error, raise it",
}
"""Advice for an assignment to a read-only property."""


def _valid_in(channels: tuple[ChannelName, ...]) -> dict[str, tuple[ChannelName, ...]]:
    return {"channels": channels}


def _refuse_assignments(cls: type[ArgsT]) -> type[ArgsT]:
    """Make an assignment to a property of ``cls`` raise an AttributeError with advice."""
    assignable = ", ".join(name for name in cls.__slots__ if not name.startswith("_"))  # type: ignore[attr-defined]  # of a dataclass with slots

    def refuse(args: object, value: object, name: str) -> NoReturn:
        advice = _REMEDIES.get(name, f"hooks may assign {assignable}")
        raise AttributeError(f"args.{name} is read-only for hooks; {advice}")

    for name, member in list(vars(cls).items()):
        if isinstance(member, property):
            setattr(cls, name, member.setter(partial(refuse, name=name)))
    return cls


@dataclass(slots=True, eq=False)
class NamedUpdates:
    """State of a step with several optimizers."""

    name: str | None = None
    """Optimizer of the current entry."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached losses of the step by name."""
    is_counted: bool = False
    """True if an update of this step was committed."""


@_refuse_assignments
@dataclass(slots=True, eq=False, repr=False, init=False)
class PipelineHookArgs:
    """Argument of every hook: one object for each scope of work.

    All channels of a step share one object; the loop, each epoch and each evaluation have their
    own. Counters show the value at the time of reading. A field that is valid in some channels
    only has its default in the others; see :meth:`channels_of`.

    With several optimizers, the forward pass, backward pass and update of one loss are an entry:
    :attr:`optimizer_name`, :attr:`optimizer`, :attr:`lr_scheduler`, :attr:`loss`,
    :attr:`attached_loss`, :attr:`grad_norm`, :attr:`skip_reason` and :attr:`update_committed` are
    those of the current entry, and None outside of entries.

    Hooks may assign the public fields, and change the contents of the batch and the model's
    weights. Everything else is read-only, see :meth:`is_assignable`: the engine alone assigns the
    fields with an underscore, and reads them, which saves the call of a property.
    """

    batch: Any = field(metadata=_valid_in(_STEP_CHANNELS))
    """Batch, on the accelerator's device. A batch assigned in a ``before`` of ``on_step``,
    ``on_batch`` or ``on_model_forward`` replaces it; :attr:`batch_size` stays."""
    model_outputs: Any = field(metadata=_valid_in(_STEP_CHANNELS))
    """Outputs of the batch processor; None until the forward pass is done. Outputs assigned in
    an ``after`` of ``on_model_forward`` are those of all later hooks, such as metrics."""
    attached_loss: torch.Tensor | None = field(metadata=_valid_in(_STEP_CHANNELS))
    """Loss with its autograd graph; hooks read :attr:`loss`. A loss assigned in an ``after`` of
    ``on_model_forward`` or a ``before`` of ``on_model_backward`` replaces it."""
    grad_norm: torch.Tensor | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Norm of all gradients before clipping, on their device; None until a hook computes it."""
    grad_norm_order: float | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Order of :attr:`grad_norm`, such as 2."""
    gradients_changed: bool = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """True if a ``before`` of ``on_optimizer_step`` changed the gradients after :attr:`grad_norm`
    was computed, as clipping does. The hook that changes them sets this."""
    skip_reason: str | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Reason to skip the optimizer step, set by a ``before`` of ``on_optimizer_step`` on every
    rank. Weights, optimizer and LR scheduler keep their state, and the gradients are dropped."""
    _run: PipelineRun
    _at_accumulation_boundary: bool = field(metadata=_valid_in(_STEP_CHANNELS))
    _loss_divisor: float = field(metadata=_valid_in(_STEP_CHANNELS))
    _given_loss_weight: torch.Tensor | None = field(metadata=_valid_in(_STEP_CHANNELS))
    _loss_weighting: LossWeighting | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    _update_committed: bool | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    _batch_skip_reason: str | None = field(metadata=_valid_in(_STEP_CHANNELS))
    _epoch_completed: bool = field(metadata=_valid_in(("on_epoch",)))
    _evaluation: str | None = field(metadata=_valid_in(("on_evaluation",)))
    _exception: BaseException | None
    _batch_size: int | None
    _named: NamedUpdates | None

    def __init__(
        self,
        run: PipelineRun | None = None,
        batch: Any = None,
        at_accumulation_boundary: bool = False,
        loss_divisor: float = 1.0,
        model_outputs: Any = None,
        attached_loss: torch.Tensor | None = None,
        update_committed: bool | None = None,
        epoch_completed: bool = False,
        evaluation: str | None = None,
        exception: BaseException | None = None,
    ) -> None:
        self._run = PipelineRun.standalone() if run is None else run
        self.batch = batch
        self.model_outputs = model_outputs
        self.attached_loss = attached_loss
        self.grad_norm = self.grad_norm_order = self.skip_reason = None
        self.gradients_changed = False
        self._at_accumulation_boundary = at_accumulation_boundary
        self._loss_divisor = loss_divisor
        self._given_loss_weight = self._loss_weighting = self._batch_size = None
        self._update_committed = update_committed
        self._batch_skip_reason = None
        self._epoch_completed = epoch_completed
        self._evaluation = evaluation
        self._exception = exception
        self._named = None

    @property
    def run(self) -> PipelineRun:
        """Objects that all scopes share; the properties below read them."""
        return self._run

    @property
    def at_accumulation_boundary(self) -> bool:
        """True if this step ends an accumulation window, so that an optimizer step is due."""
        return self._at_accumulation_boundary

    @property
    def loss_divisor(self) -> float:
        """Divisor of the loss in the backward pass; infinite in a padding step.

        The samples of the accumulation window, averaged over the ranks, divided by the samples of
        this batch.
        """
        return self._loss_divisor

    @property
    def given_loss_weight(self) -> torch.Tensor | None:
        """Weight that the batch processor returned with the loss, on the device, or None."""
        return self._given_loss_weight

    @property
    def loss_weighting(self) -> LossWeighting | None:
        """Scaling of the window's gradients for losses with weights.

        None without weights, and for a window of one batch on one rank.
        """
        return self._loss_weighting

    @property
    def update_committed(self) -> bool | None:
        """True if the optimizer step changed the weights, False if skipped, None before."""
        return self._update_committed

    @property
    def epoch_completed(self) -> bool:
        """In ``after``: True if the epoch reached the end of its data."""
        return self._epoch_completed

    @property
    def evaluation(self) -> str | None:
        """Name of the hook that evaluates; None outside of evaluations."""
        return self._evaluation

    @property
    def exception(self) -> BaseException | None:
        """In ``after``: the error that leaves the scope, or None."""
        return self._exception

    @property
    def is_padding_step(self) -> bool:
        """True if this rank has no data for a step, or if a hook has skipped its batch.

        If other ranks have data, the rank takes part with a batch of weight 0: ``batch_size`` is 0,
        ``sample_numbers`` is empty, gradients are zero, and buffers and RNG states are restored.
        Metrics should ignore ``model_outputs`` and ``loss``.
        """
        return self._loss_divisor == math.inf or self._batch_skip_reason is not None

    @property
    def is_filler(self) -> NoReturn:
        """Former name of :attr:`is_padding_step`; raises an AttributeError."""
        raise AttributeError("args.is_filler was renamed; read args.is_padding_step")

    @property
    def batch_size(self) -> int:
        """Number of samples of the batch on this rank; 0 in a padding step.

        Counted on first access, by the batch processor's ``count_samples(batch)`` where defined,
        else by dataset indices, else by the structure of the batch.
        """
        count = self._batch_size
        if count is None:
            # is_padding_step, without the call
            is_padding = self._loss_divisor == math.inf or self._batch_skip_reason is not None
            count = self._batch_size = 0 if is_padding else self._run.count_samples(self.batch)
        return count

    @property
    def loss_weight(self) -> float | torch.Tensor:
        """Weight of this batch's loss in a mean of losses, on this rank; 0 in a padding step.

        The weight that the batch processor returned, or else the number of samples.
        """
        weight = self._given_loss_weight
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
    def losses(self) -> Mapping[str, torch.Tensor]:
        """Losses of this step by optimizer, like :attr:`loss`; empty with one optimizer.

        The last loss of each name, as far as the step has computed it.
        """
        return {} if self._named is None else self._named.losses

    @property
    def optimizer_name(self) -> str | None:
        """Name of the entry's optimizer; None with one optimizer and outside of entries.

        In a ``before`` of ``on_model_forward`` the name is unknown, and None: the forward pass
        decides which loss follows.
        """
        return None if self._named is None else self._named.name

    def metric_name(self, name: str) -> str:
        """Return a metric's name with that of the entry's optimizer, such as ``grad_norm/g``."""
        owner = self.optimizer_name
        return name if owner is None else f"{name}/{owner}"

    @property
    def progress(self) -> TrainerProgress:
        """All counters."""
        return self._run.progress

    @property
    def epoch_id(self) -> int:
        """Epoch, from 0."""
        return self._run.progress.epoch_id

    @property
    def step_id(self) -> int:
        """Step within the epoch, from 0."""
        return self._run.progress.step_id

    @property
    def global_step_id(self) -> int:
        """Step within the run, from 0."""
        return self._run.progress.global_step_id

    @property
    def optimizer_step_id(self) -> int:
        """Number of committed optimizer steps."""
        return self._run.progress.optimizer_step_id

    @property
    def batch_processor(self) -> BatchProcessor:
        """Batch processor: computes outputs and loss of a batch."""
        return self._run.batch_processor

    @property
    def limits(self) -> TrainerLimits:
        """Limits of the run."""
        return self._run.limits

    @property
    def max_step(self) -> int | None:
        """Limit in steps, or None."""
        return self._run.limits.max_step

    @property
    def max_optimizer_step(self) -> int | None:
        """Limit in optimizer steps, or None."""
        return self._run.limits.max_optimizer_step

    @property
    def max_epoch(self) -> int | None:
        """Limit in epochs, or None."""
        return self._run.limits.max_epoch

    @property
    def accelerator(self) -> Accelerator:
        """Devices, processes and precision."""
        return self._run.accelerator

    @property
    def model(self) -> torch.nn.Module:
        """Model as prepared: on its device, wrapped in DDP for several processes.

        With several optimizers the model is not wrapped: the trainer averages the gradients.
        """
        return self._run.model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer that is stepped; None without a backward pass."""
        return self._run.optimizers.get(self.optimizer_name or "")

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler of the optimizer, or None."""
        return self._run.lr_schedulers.get(self.optimizer_name or "")

    @property
    def scaler(self) -> Any:
        """Gradient scaler of the optimizer, for fp16, or None."""
        return self._run.scalers.get(self.optimizer_name or "")

    @property
    def dataloader(self) -> Any:
        """Data loader that was passed to the trainer."""
        return self._run.dataloader

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """Positions of this rank's samples in the epoch's order, from 0, over the whole job.

        Valid in the channels of a step; empty in a padding step; None for data without positions.
        """
        if self.is_padding_step:
            return []
        return None if self._run.data is None else self._run.data.sample_numbers

    @property
    def sample_indices(self) -> Any:
        """Dataset indices of this rank's samples, as a list.

        Valid in the channels of a step; empty in a padding step; None for data without indices.
        """
        if self.is_padding_step:
            return []
        return None if self._run.data is None else self._run.data.sample_indices

    @property
    def metrics(self) -> MetricsBoard:
        """Metrics board, to publish named scalars."""
        return self._run.metrics

    @property
    def report(self) -> Report:
        """Report, to add images, videos, text, tables and hyperparameters."""
        return self._run.report

    @property
    def requests(self) -> Requests:
        """Requests to the trainer: save, evaluate, log, stop."""
        return self._run.requests

    def begin_entry(self, name: str | None, loss: torch.Tensor | None = None) -> None:
        """Reset the fields of an entry, for the loss of an optimizer; None ends the entries.

        The trainer calls this in a step with several optimizers.
        """
        assert self._named is not None  # set in each step
        self._named.name = name
        self.attached_loss = loss
        self.grad_norm = self.grad_norm_order = self.skip_reason = self._update_committed = None
        self.gradients_changed = False

    @property
    def batch_skip_reason(self) -> str | None:
        """Reason of :meth:`skip_batch`; None if the batch is not skipped."""
        return self._batch_skip_reason

    def skip_batch(self, reason: str) -> None:
        """Skip this batch, in a ``before`` of ``on_step`` or ``on_batch``.

        The step counts, and its hooks run. On one rank there is no forward and no backward pass. On
        several ranks, of which one may skip alone, the rank runs a padding step with its last batch
        that was not skipped, or with this one; see :meth:`allow_skip_batch`. The optimizer step
        uses the mean over the other samples of the accumulation window; without any, there is no
        optimizer step, and ``on_optimizer_step`` does not open.

        Args:
            reason: reason, for the log; the first batch of each reason is logged as a warning.

        Raises:
            PipelineStateError: the batch was processed already, no step is open, or there are
                several ranks and no hook has called :meth:`allow_skip_batch`.
            ValueError: the reason is not a text.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(
                "args.skip_batch: expected a reason, such as 'corrupt sample', found "
                f"{reason!r:.60}"
            )
        is_done = self.model_outputs is not None or self.attached_loss is not None
        if is_done or not self.progress.in_step:
            raise PipelineStateError(SKIP_TOO_LATE)
        if self._run.agreement.several and not self._run.may_skip_batches:
            raise PipelineStateError(
                "args.skip_batch: with several ranks, all of them must know that one may skip a "
                "batch; call args.allow_skip_batch() in a before of on_loop, on every rank"
            )
        if self._loss_divisor != math.inf and self._batch_skip_reason is None:
            self._batch_skip_reason, self._batch_size = reason, 0

    def allow_skip_batch(self) -> None:
        """Allow :meth:`skip_batch` on several ranks; in a ``before`` of ``on_loop``, on every rank.

        Costs a small all-reduce and a multiplication of all gradients per optimizer step,
        and the memory of one batch. Does nothing on one rank.
        """
        self._run.may_skip_batches = True

    def evaluating(
        self, weights: str | None = None, *, rank_local: bool = False
    ) -> AbstractContextManager[Any]:
        """Return a context for samples or rollouts: evaluation mode, no gradients.

        The context yields the model, without DDP's communication. At its end, also after an error,
        modes, buffers, weights and the global RNGs are as before; seed them in the body for equal
        random numbers each time. The body runs in the precision of a batch processor.

        >>> args = PipelineHookArgs()
        >>> with args.evaluating() as model:
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> args.model.training
        True

        Args:
            weights: name of the hook whose weights to use, such as ``"EMA"``; None for the model's
                own.
            rank_local: enter on this rank alone, with its own buffers. Otherwise all ranks enter,
                and a model with buffers has the first rank's: a collective.

        Raises:
            PipelineConfigError: no hook of that name keeps weights.
            PipelineStateError: the weights are applied already, or ``rank_local`` with a sharded
                model, whose forward pass is a collective.
        """
        return self._run.evaluating(weights, rank_local=rank_local)

    def failing(self, error: BaseException | None) -> None:
        """Set :attr:`exception`, and report an error to the other ranks.

        Channels call this before the first ``after`` of a failure, and restore the earlier value
        after the last.
        """
        self._exception = error
        if error is not None:
            report_failure(error)

    @classmethod
    def channels_of(cls, name: str) -> tuple[ChannelName, ...]:
        """Return the channels in which a field is valid.

        >>> PipelineHookArgs.channels_of("epoch_completed")
        ('on_epoch',)
        """
        names = {name, _BACKING_FIELD.get(name, f"_{name}")}
        for declared in fields(cls):
            if declared.name in names:
                channels: tuple[ChannelName, ...] = declared.metadata.get("channels", CHANNEL_NAMES)
                return channels
        if isinstance(getattr(cls, name, None), property):
            return CHANNEL_NAMES
        raise AttributeError(f"{cls.__name__} has no field {name!r}")

    @classmethod
    def is_assignable(cls, name: str) -> bool:
        """Return True if hooks may assign a field.

        >>> PipelineHookArgs.is_assignable("batch"), PipelineHookArgs.is_assignable("loss")
        (True, False)
        """
        cls.channels_of(name)  # raises for an unknown field
        return not name.startswith("_") and name in {declared.name for declared in fields(cls)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.progress}>"
