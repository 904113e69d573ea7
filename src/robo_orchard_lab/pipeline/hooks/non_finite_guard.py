"""Keep losses and gradients that are not finite from spoiling a run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.distributed
from accelerate.utils import DistributedType
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.gradient_norm import gradient_norm
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.window_recorder import (
    Finding,
    LateReading,
    ObservedUpdate,
    WindowRecorder,
    pack,
    unpack,
)
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.model import BufferSnapshot, plain_model, plain_name
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, local_tensor

# --- finite tally ----------------------------------------------------------------------------
# Whether all updates were finite, known where the packed values of a run are read.


FLAG = "guard/non_finite"


class FiniteTally:
    """Whether all updates since it was made were finite, and how many were before the first bad.

    It stays on the device and takes some four small operations for each update.
    """

    def __init__(self, begin: int, device: torch.device) -> None:
        self._begin = begin  # how many updates were due before it was made
        self._loss, self._norm = torch.zeros(2, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)

    def add(self, losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Take one update in."""
        for loss in losses:
            self._loss.add_(loss.reshape(()), alpha=0)  # 0 times infinity is NaN, which stays
        if norm is not None:
            self._norm.add_(norm, alpha=0)
        self._finite.add_(self._loss == self._norm)  # 0 == 0; NaN equals nothing

    @property
    def flag(self) -> torch.Tensor:
        """Whether something was not finite, on the device."""
        return torch.isnan(self._loss + self._norm)

    def read(self) -> tuple[str, int] | None:
        """What was not finite, and in which update; None where all was. Waits for the device."""
        loss, norm = torch.stack([self._loss, self._norm]).tolist()
        named = {"loss": loss, "gradient norm": norm}
        bad = [f"the {name}" for name, value in named.items() if math.isnan(value)]
        if not bad:
            return None
        text = f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} not finite"
        return text, self._begin + int(self._finite)


class LoggingPointCheck:
    """Publishes a tally with each logging point, and fails where one was not finite, on any rank.

    It does so ahead of the next step, so that whoever shows the values of that logging point has
    got them.

    Args:
        fail: raises; it is given what was wrong, and in which update, where this rank knows.
    """

    def __init__(self, fail: Callable[[str, int | None], NoReturn]) -> None:
        self._fail = fail
        self._tally: FiniteTally | None = None
        self._told = False
        self._handles: list[RemovableHandle] = []

    def start(self, args: PipelineHookArgs, who: str) -> None:
        """The run begins; ``who`` waits for what is published, for errors."""

        tally = FiniteTally(_updates_due(args.progress), args.accelerator.device)

        def publish() -> None:
            args.metrics.publish(FLAG, tally.flag, reduce="max")

        def be_told(value: MetricValue) -> None:
            self._told = value.value > 0

        self._tally = tally
        args.metrics.publish(FLAG, 0.0, reduce="max")  # so that the name is known in any case
        self._handles = [
            args.metrics.before_logging(publish),
            args.metrics.subscribe(FLAG, be_told, who),
        ]

    def add(self, losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Take one update in."""
        if self._tally is not None:
            self._tally.add(losses, norm)

    def raise_told(self) -> None:
        """Fail if the last logging point has found something."""
        if self._told and self._tally is not None:
            self._fail(*(self._tally.read() or ("another rank found what is not finite", None)))

    def end(self, args: PipelineHookArgs) -> None:
        """The run is over: fail if there is something, told by a logging point or not."""
        for handle in self._handles:
            handle.remove()
        if args.exception is None:
            self.raise_told()
            found = self._tally.read() if self._tally is not None else None
            if found is not None:
                self._fail(*found)


def _updates_due(progress: TrainerProgress) -> int:
    """How many updates have been due, committed or skipped."""
    return progress.optimizer_step_id + progress.skipped_optimizer_steps


# --- non finite error ------------------------------------------------------------------------
# What is said of an update that is not finite.


_SHOWN = 3  # of the names and ids in a message


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or not a number; the message says which, where and when."""

    __module__ = "robo_orchard_lab.pipeline.hooks.non_finite_guard"  # the name to import it by

    def __init__(
        self, message: str, folder: Path | None = None, parameters: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.folder = folder
        """Where the batches lie, for ``replay``; None where they were not written."""
        self.parameters = tuple(parameters)
        """The names of those with gradients that are not finite, where that is known."""


def bad_gradients(args: PipelineHookArgs) -> list[str] | None:
    """The parameters whose gradients are not finite, in the model's order; reads from the device.

    A collective where they are sharded. None where that is not known: clipping by a norm that is
    NaN makes all of them NaN.
    """
    if args.gradients_changed:
        return None
    parameters = plain_model(args.run).named_parameters()
    named = [(plain_name(name), p.grad) for name, p in parameters if p.grad is not None]
    flags = [
        (local.coalesce().values() if local.is_sparse else local).isfinite().all()
        for local in (local_tensor(gradient) for _, gradient in named)
    ]
    packed = torch.stack(flags).int() if flags else torch.ones(0)
    if has_sharded(gradient for _, gradient in named):
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MIN)  # a collective
    finite = packed.tolist()  # waits for the device
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def what_and_when(
    args: PipelineHookArgs,
    finding: Finding,
    update: ObservedUpdate,
    parameters: Sequence[str] | None,
) -> str:
    """What is not finite in an update, on which rank, at which counters, of which samples.

    Args:
        args: of the update that is open.
        finding: what is wrong.
        update: the one it is wrong with.
        parameters: whose gradients are not finite; None where that is not known.
    """
    text = str(finding)
    if args.accelerator.num_processes > 1:
        text += f" on rank {args.accelerator.process_index} of {args.accelerator.num_processes}"
        if not finding.bad_losses:
            text += ", where the loss is finite"
    text += f", at {update.progress}"
    if finding.bad_norm and parameters:
        text += f", by the gradients of {_some(parameters)}"
    elif finding.bad_norm and parameters is not None:
        text += ", though each gradient is finite"
    elif finding.bad_norm and update.clipped:
        text += ", clipped before anyone could tell by which gradient"
    bad = [step for step in update.steps if not step.finite] or update.steps
    ids = [str(sample) for step in bad for sample in step.sample_ids or ()]
    return text + (f", samples {_some(ids)}" if ids else "")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


__all__ = ["NonFiniteError", "NonFiniteGuard", "NonFiniteGuardConfig"]

STATE_VERSION = 1
_MADE = "The update was made before this was read (read={!r}), so that the weights are spoilt."

logger = logging.getLogger(__name__)


class NonFiniteGuard(PipelineHooks):
    """Ends the run, or skips the update, where a loss or the gradient norm is not finite.

    Ahead of each update it looks at the losses of the accumulation window and at the norm of all
    gradients, which it shares with clipping. One bad batch spoils its window.

    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
    >>> model = torch.nn.Linear(1, 1)
    >>> trainer = HookBasedTrainer(
    ...     Accelerator(cpu=True),
    ...     model,
    ...     [torch.ones(2, 1), torch.full((2, 1), torch.nan), torch.ones(2, 1)],
    ...     SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch).mean())),
    ...     torch.optim.SGD(model.parameters(), lr=0.1),
    ...     hooks=[NonFiniteGuardConfig(policy="skip")],
    ...     max_epoch=1,
    ... )
    >>> trainer()
    >>> print(trainer.progress)
    epoch 1, step 0 (global step 3, 2 updates committed, 1 skipped)

    After a skipped update the weights, the buffers (such as running statistics), the optimizer,
    the schedule and the scale of an fp16 scaler are what they were before its window; the steps
    and the random numbers that it took stay taken. How many were skipped in a row is saved and
    resumed.

    It runs on every rank. To decide alike without talking, a loss that is not finite makes the
    gradients of all ranks so: with several processes each loss is multiplied by 1 or else by NaN
    ahead of its backward pass. Only the joint gradients decide then about skipping. Where a part
    of the loss stops all gradients (a clamp), they stay finite, and the update is made.

    With an fp16 scaler it looks at the losses alone: gradients that overflow are the scaler's.

    Register it ahead of clipping, which spreads a NaN over all gradients, to be told whose it was,
    and behind hooks that draw random numbers ahead of a forward pass, for the replay to be exact.

    Cost of an update: the norm, unless it is clipped by as well; by ``read="now"`` one wait for
    the device; where buffers are restored or batches quarantined, a copy of the buffers; and, in
    quarantine, the memory of the batches of a window until its update is over.

    Raises:
        NonFiniteError: something is not finite, and the policy is to raise.
        PipelineConfigError: when the run begins, ``policy="skip"`` where it can't be done: with
            an engine that updates within the backward pass (DeepSpeed, Megatron-LM), or with fp16
            and several processes, where the loss of another rank looks like an overflow.
    """

    def __init__(self, cfg: NonFiniteGuardConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.skips_in_a_row = 0
        """How many updates it has skipped since one was committed."""
        self._losses: list[torch.Tensor] = []  # of the window that is open
        self._scaler_state: dict[str, Any] | None = None
        self._recorder: WindowRecorder | None = None
        if cfg.quarantine is not None:
            self._recorder = WindowRecorder(cfg.quarantine, cfg.max_quarantined, cfg.sample_ids)
        self._restores = cfg.policy == "skip" and cfg.restore_buffers
        keeps = self._restores or (self._recorder is not None and cfg.read == "now")
        self._buffers = BufferSnapshot() if keeps else None
        self._late = LateReading()
        self._sent: ObservedUpdate | None = None
        self._check = LoggingPointCheck(self._fail_at_logging_point)

        look = {
            "now": self._look_now,
            "one update late": self._look_late,
            "at logging points": self._look_at_logging_points,
        }[cfg.read]
        on = HookContext.from_callable
        self.register_hook("on_loop", on(before=self._start, after=self._end))
        if cfg.read == "at logging points":
            self.register_hook("on_step", on(before=self._raise_told))
        if self._recorder is not None or self._buffers is not None:
            self.register_hook("on_model_forward", on(before=self._before_forward))
        self.register_hook("on_model_backward", on(before=self._before_backward))
        self.register_hook("on_optimizer_step", on(before=look, after=self._after_update))

    def _start(self, args: PipelineHookArgs) -> None:
        if self.cfg.policy == "skip":
            self._refuse_what_cannot_skip(args)
        if self._buffers is not None:
            self._buffers.attach(plain_model(args.run))
        if self.cfg.read == "at logging points":
            self._check.start(args, self.name)

    def _end(self, args: PipelineHookArgs) -> None:
        if self.cfg.read == "at logging points":
            self._check.end(args)
        if args.exception is None:
            self._look_back(args)
        self._sent = None

    def _refuse_what_cannot_skip(self, args: PipelineHookArgs) -> None:
        accelerator = args.accelerator
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise PipelineConfigError(
                f"{self.name}: policy='skip' can't be kept with {accelerator.distributed_type}, "
                "which updates the weights within the backward pass; use policy='raise'"
            )
        if accelerator.scaler is not None and accelerator.num_processes > 1:
            raise PipelineConfigError(
                f"{self.name}: policy='skip' can't be kept with fp16 on several processes, where "
                "the gradients of another rank's NaN look like an overflow, which the scaler "
                "skips by itself; use policy='raise', or mixed_precision='bf16'"
            )

    def _before_forward(self, args: PipelineHookArgs) -> None:
        if self._buffers is not None and not self._losses:  # the window begins
            self._buffers.save()
        if self._recorder is not None:
            self._recorder.before_forward(args)

    def _before_backward(self, args: PipelineHookArgs) -> None:
        loss = args.attached_loss
        if args.is_padding_step or not isinstance(loss, torch.Tensor):  # which the trainer refuses
            return
        detached = loss.detach()
        self._losses.append(detached)
        if self._recorder is not None:
            self._recorder.before_backward(args, detached)
        if args.accelerator.num_processes > 1:
            args.attached_loss = loss * (detached * 0 + 1)  # by 1, or by NaN

    def _observe(self, args: PipelineHookArgs) -> ObservedUpdate | None:
        """What goes into the update that is due; None where another hook has it skipped."""
        losses, self._losses = self._losses, []
        steps = self._recorder.take() if self._recorder is not None else []
        if args.skip_reason is not None:
            return None
        norm = None if args.accelerator.scaler is not None else gradient_norm(args)
        order = args.grad_norm_order or 2.0
        return ObservedUpdate(
            losses, norm, order, args.gradients_changed, steps, args.progress, args.loss_weighting
        )

    def _look_now(self, args: PipelineHookArgs) -> None:
        update = self._observe(args)
        if update is None or not (update.losses or update.norm is not None):
            return
        values = pack(update.losses, update.norm).tolist()  # waits for the device, once an update
        finding = unpack(values, update.norm is not None)
        if finding.finite:
            return
        cfg = self.cfg
        if cfg.policy == "skip" and args.accelerator.num_processes > 1 and not finding.bad_norm:
            logger.warning(
                "%s: %s on rank %d at %s, and no gradient shows it; the update is made, as on all "
                "other ranks",
                *(self.name, finding, args.accelerator.process_index, args.progress),
            )
            return
        parameters = bad_gradients(args) if finding.bad_norm else []
        folder = None
        if self._recorder is not None:
            kept = self._buffers.named() if self._buffers is not None else {}
            folder = self._recorder.write(args, update, finding, parameters or [], kept)
        what = what_and_when(args, finding, update, parameters)
        skips, limit = self.skips_in_a_row, cfg.max_skips_in_a_row
        if cfg.policy == "raise" or (limit is not None and skips >= limit):
            outcome = "The update was not made: the weights are those before it."
            if cfg.policy == "skip":
                outcome += f" The {skips} before it were skipped (max_skips_in_a_row={limit})."
            raise self._error(what, outcome, folder, parameters or [])
        self._skip(args, what, folder, tell=bool(finding.bad_losses))

    def _skip(self, args: PipelineHookArgs, what: str, folder: Path | None, tell: bool) -> None:
        self.skips_in_a_row += 1
        args.skip_reason = what
        if self._restores and self._buffers is not None:
            self._buffers.restore()
        if args.accelerator.scaler is not None:
            self._scaler_state = args.accelerator.scaler.state_dict()
        skipped = args.progress.skipped_optimizer_steps + 1
        args.metrics.publish("guard/skipped", skipped, reduce="max")
        if tell or args.accelerator.is_main_process:
            where = f"; the batches lie in {folder}" if folder is not None else ""
            row = self.skips_in_a_row
            logger.warning("%s skips the update, %d in a row: %s%s", self.name, row, what, where)

    def _after_update(self, args: PipelineHookArgs) -> None:
        if args.update_committed:
            self.skips_in_a_row = 0
        if self._scaler_state is not None:  # a NaN in the loss says nothing about its scale
            args.accelerator.scaler.load_state_dict(self._scaler_state)
            self._scaler_state = None

    def _look_late(self, args: PipelineHookArgs) -> None:
        self._look_back(args)
        update = self._observe(args)
        if update is not None and (update.losses or update.norm is not None):
            self._late.start(pack(update.losses, update.norm))
            update.progress = copy.copy(update.progress)
            self._sent = update

    def _look_back(self, args: PipelineHookArgs) -> None:
        """Raise if the update before was not finite."""
        update, self._sent = self._sent, None
        if update is None:
            return
        finding = unpack(self._late.take(), update.norm is not None)
        if finding.finite:
            return
        folder = None
        if self._recorder is not None:
            folder = self._recorder.write(args, update, finding, [], None)
        what = what_and_when(args, finding, update, None)
        raise self._error(what, _MADE.format(self.cfg.read), folder, [])

    def _raise_told(self, args: PipelineHookArgs) -> None:
        self._check.raise_told()

    def _look_at_logging_points(self, args: PipelineHookArgs) -> None:
        update = self._observe(args)
        self._check.add(*((update.losses, update.norm) if update is not None else ((), None)))

    def _fail_at_logging_point(self, what: str, update_id: int | None) -> NoReturn:
        when = "" if update_id is None else f" in update {update_id} (from 0, skipped ones counted)"
        raise NonFiniteError(
            f"{self.name}: {what}{when}. {_MADE.format(self.cfg.read)} Go on from a checkpoint "
            "ahead of it, with read='now' to have it skipped or its batches quarantined"
        )

    def _error(
        self, what: str, outcome: str, folder: Path | None, parameters: Sequence[str]
    ) -> NonFiniteError:
        where = "Set quarantine to a folder to have the batches written, for a replay"
        if folder is not None:
            module = "robo_orchard_lab.pipeline.quarantine"
            where = (
                f"The batches lie in {folder}; run them again by "
                f"{module}.replay({str(folder)!r}, model, batch_processor)"
            )
        elif self._recorder is not None:
            where = "The batches were not written; the log says why"
        return NonFiniteError(f"{self.name}: {what}. {outcome} {where}", folder, parameters)

    def state_dict(self) -> dict[str, Any]:
        kept = self._buffers.named() if self._losses and self._buffers is not None else None
        return {
            "version": STATE_VERSION,
            "skips_in_a_row": self.skips_in_a_row,
            # Of an accumulation window that is open.
            "losses": list(self._losses),
            "buffers": kept and {name: buffer.clone() for name, buffer in kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self.skips_in_a_row = state["skips_in_a_row"]
        self._losses = list(state["losses"])
        if self._buffers is not None and state["buffers"] is not None:
            self._buffers.load(state["buffers"])


class NonFiniteGuardConfig(PipelineHooksConfig[NonFiniteGuard]):
    """What a guard does about losses and gradients that are not finite, and when it knows.

    >>> NonFiniteGuardConfig(policy="skip", quarantine="quarantine", sample_ids="index")().name
    'NonFiniteGuard'
    """

    class_type: type[NonFiniteGuard] = NonFiniteGuard
    policy: Literal["raise", "skip"] = Field(
        default="raise", description="End the run, or go on without the update."
    )
    max_skips_in_a_row: int | None = Field(
        default=10,
        ge=1,
        description="With policy='skip': after how many skipped updates without one that was "
        "committed the next is not skipped any more; None for no limit.",
    )
    then: Literal["raise"] = Field(
        default="raise",
        description="What is done where the limit of skips is passed; going back to a checkpoint "
        "is not offered yet.",
    )
    read: Literal["now", "one update late", "at logging points"] = Field(
        default="now",
        description="When it is known whether an update is finite: ahead of it, which waits for "
        "the device; ahead of the next one; or with the packed values of the next logging point. "
        "The later two are for policy='raise', and find the weights spoilt.",
    )
    restore_buffers: bool = Field(
        default=True,
        description="With policy='skip': put the model's buffers back as they were before the "
        "window, for the price of copying them ahead of each.",
    )
    quarantine: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description="The folder in which windows that are not finite are written, each as "
        "step_<its last global step>, for a replay; None writes none.",
    )
    max_quarantined: int = Field(
        default=3,
        ge=1,
        description="How many windows of each rank may lie in the quarantine; the first stay.",
    )
    sample_ids: str | int | None = Field(
        default=None,
        description="The key or index in a batch of its samples' ids, to be told and written; "
        "None where it has none.",
    )

    def __post_init__(self) -> None:
        if self.policy == "skip" and self.read != "now":
            raise ValueError(
                f"policy='skip' needs read='now', got read={self.read!r}: an update can be skipped "
                "only while it has not been made"
            )
        if self.quarantine is not None and self.read == "at logging points":
            raise ValueError(
                "quarantine needs read='now' or read='one update late', got read='at logging "
                "points': the batches are gone by then"
            )
