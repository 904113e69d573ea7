"""Hook that guards a run against non-finite losses and gradients."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.distributed
from accelerate.utils import DistributedType
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.gradient_norm import gradient_norm
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig, for_optimizers
from robo_orchard_lab.pipeline.hooks.finite_checks import (
    FLAG,
    DelayedRead,
    Finding,
    LoggingPointCheck,
    ObservedUpdate,
    WindowRecorder,
    bad_gradients,
    describe_problem,
    pack,
    unpack,
)
from robo_orchard_lab.pipeline.hooks.preemption import require_saver
from robo_orchard_lab.pipeline.model import BufferSnapshot, plain_model, plain_name
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharding import non_finite_weights
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Tensors, Text

__all__ = ["NonFiniteError", "NonFiniteGuard", "NonFiniteGuardConfig"]

STATE_VERSION = 1
_ALREADY_APPLIED = (
    "The update was made before the values were read (read={!r}), so the weights are spoilt."
)

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """Non-finite loss or gradient; the message says which, where and when."""

    def __init__(
        self, message: str, folder: Path | None = None, parameters: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.folder = folder
        """Folder of the written batches, for ``replay``; None if not written."""
        self.parameters = tuple(parameters)
        """Names of the parameters with non-finite gradients, if known."""


class NonFiniteGuard(PipelineHooks):
    """Guard against non-finite losses and gradient norms: end the run, skip the update or go back.

    Before each update, the guard checks the losses of the accumulation window and the norm of all
    gradients. One bad batch spoils its window.

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
    step 3 (epoch 1, 2 updates committed, 1 skipped)

    A skipped update restores weights, buffers, optimizer, LR scheduler and fp16 loss scale to their
    state before the window. Consumed steps and random numbers stay consumed.

    With ``then="rollback"``, the run continues from the newest healthy checkpoint instead of
    ending, as a resumed run does. With ``skip_batch``, the updates that led to the rollback are
    skipped when the run reaches them again: the bad ones, or, if a committed update had made the
    weights non-finite, that one. Random numbers and steps are consumed as before.

    Before weights or a checkpoint are written, the guard reads the last update.

    All ranks decide the same without an additional collective: with several processes, each loss
    is multiplied by 1 or NaN before its backward pass, so a non-finite loss spoils the gradients of
    all ranks. Then only the reduced gradients decide about skips and rollbacks. If a clamp in the
    loss blocks all gradients, the gradients stay finite and the update is made. With an fp16
    scaler, only losses are checked; the scaler handles overflowing gradients.

    Register the guard before clipping, which spreads a NaN to all gradients, and after hooks that
    consume random numbers before a forward pass, so that a replay is exact.

    With several optimizers, each update is checked by itself, with its own losses and gradients. A
    skipped update restores all buffers after the last update of the step, to their state before the
    accumulation window.

    - Ranks: all.
    - Publishes: ``guard/skipped``, the number of skipped updates, after each skip;
      ``guard/non_finite`` with ``read="at logging points"``.
    - Requests: with ``then="rollback"``, a rollback. Sets ``args.skip_reason``.
    - State: the numbers of consecutive skips (with several optimizers by name) and of rollbacks,
      and the updates to leave out; within a window, its losses and the buffers before.
    - Cost per update: the norm, shared with clipping; with ``read="now"`` one device sync; a copy
      of the buffers if restored or quarantined; with ``quarantine``, memory for the batches.

    Raises:
        NonFiniteError: non-finite values with ``policy="raise"``, or too many consecutive skips.
        PipelineConfigError: ``policy="skip"`` or ``then="rollback"`` at the start of a run with an
            engine that updates in the backward pass (DeepSpeed, Megatron-LM), or with fp16 on
            several processes, where a NaN of another rank looks like an overflow; a rollback
            without a hook that saves checkpoints.
    """

    published_metrics = ("guard/skipped", FLAG)
    reads = ("loss", "gradients", "grad_norm", "skip_reason", "update_committed")
    changes = ("attached_loss", "grad_norm")
    requests = ()

    def __init__(self, cfg: NonFiniteGuardConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._skips: dict[str, int] = {}  # in a row, by optimizer
        self.rollbacks = 0
        """Number of rollbacks of the run."""
        self._left_out: set[int] = set()  # last global steps of the windows to leave out
        self._bad_windows: list[int] = []  # last global steps of the skips in a row
        self._last_committed: int | None = None  # last global step of a window
        self._losses: dict[str, list[torch.Tensor]] = {}  # of the open window, by optimizer
        self._is_restore_due = False  # after the step, with several optimizers
        self._scaler_state: dict[str, Any] | None = None
        self._recorder: WindowRecorder | None = None
        if cfg.quarantine is not None:
            self._recorder = WindowRecorder(cfg.quarantine, cfg.max_quarantined, cfg.sample_ids)
        is_skipping = cfg.policy == "skip" or cfg.skip_batch
        self._should_restore = is_skipping and cfg.restore_buffers
        keeps_buffers = self._should_restore or (self._recorder is not None and cfg.read == "now")
        self._buffers = BufferSnapshot() if keeps_buffers else None
        self._delayed_read = DelayedRead()
        self._unread: ObservedUpdate | None = None
        self._logging_check = LoggingPointCheck(self._fail_at_logging_point)

        if self._should_restore:
            self.declare_effects(changes=["model.buffers"])
        if keeps_buffers:
            self.declare_effects(reads=["model.buffers", "losses"])
        if self._recorder is not None:
            self.declare_effects(reads=["batch", "loss_weight", "model.weights", "random state"])
            self.declare_effects(changes=["files"])
        if cfg.skip_batch:
            self.declare_effects(reads=["model.weights", "model.buffers"])
        if is_skipping or cfg.then == "rollback":
            self.declare_effects(changes=["skip_reason"])
        if cfg.policy == "skip" or cfg.read == "at logging points":
            self.declare_effects(changes=["metrics"])
        if cfg.then == "rollback":
            self.declare_effects(requests=["rollback"])

        check = {
            "now": self._check_now,
            "one update late": self._check_late,
            "at logging points": self._check_at_logging_points,
        }[cfg.read]
        on = HookContext.from_callable
        self.register_hook("on_loop", on(before=self._start, after=self._end))
        if cfg.read == "at logging points":
            self.on_step.before(lambda args: self._logging_check.raise_if_flagged())
        if self._recorder is not None or self._buffers is not None:
            self.on_model_forward.before(self._before_forward)
        own = partial(for_optimizers, cfg.optimizers)
        self.on_model_backward.before(own(self._before_backward))
        around = on(before=own(check), after=own(self._after_update))
        self.register_hook("on_optimizer_step", around)
        if cfg.then == "rollback":  # when all savers have begun the loop
            self.on_epoch.before(lambda args: require_saver(args, self.name, "then='raise'"))

    @property
    def skips_in_a_row(self) -> int:
        """Number of skipped updates since the last committed one; the most of any optimizer."""
        return max(self._skips.values(), default=0)

    def _start(self, args: PipelineHookArgs) -> None:
        for index, name in enumerate(self.cfg.optimizers or ()):
            args.run.check_optimizer(name, self.name, "optimizers", index)
        if self._recorder is not None and args.run.optimizer_names:
            raise PipelineConfigError(
                f"{args.run.locate(self.name, 'quarantine')}: quarantine needs a trainer with one "
                "optimizer, since a replay can't repeat the updates within a step; leave it out"
            )
        if self.cfg.policy == "skip" or self.cfg.then == "rollback":
            self._refuse_unsupported_skip(args)
        if self._buffers is not None:
            self._buffers.attach(plain_model(args.run))
        if args.run.optimizer_names and self._should_restore:
            args.run.after_updates[self.name] = self._restore_after_step
        args.run.before_saves[self.name] = partial(self._check_previous, args)
        if self.cfg.read == "at logging points":
            self._logging_check.start(args, self.name)
            args.run.before_saves[self.name] = self._logging_check.check

    def _end(self, args: PipelineHookArgs) -> None:
        args.run.before_saves.pop(self.name, None)
        args.run.after_updates.pop(self.name, None)
        if self.cfg.read == "at logging points":
            self._logging_check.end(args)
        if args.exception is None and args.requests.rollback_request is None:
            self._check_previous(args)
        self._unread = None

    def _refuse_unsupported_skip(self, args: PipelineHookArgs) -> None:
        accelerator = args.accelerator
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise PipelineConfigError(
                f"{self.name}: a skip or rollback is not supported with "
                f"{accelerator.distributed_type}, which updates the weights in the backward pass; "
                "use policy='raise' and then='raise'"
            )
        if accelerator.scaler is not None and accelerator.num_processes > 1:
            raise PipelineConfigError(
                f"{self.name}: a skip or rollback is not supported with fp16 on several "
                "processes, where a NaN of another rank looks like an overflow to the scaler; use "
                "policy='raise' and then='raise', or mixed_precision='bf16'"
            )

    def _before_forward(self, args: PipelineHookArgs) -> None:
        if self._buffers is not None and not self._losses and not args.losses:
            self._buffers.save()  # at the start of the accumulation window
        if self._recorder is not None:
            self._recorder.before_forward(args)

    def _before_backward(self, args: PipelineHookArgs) -> None:
        loss = args.attached_loss
        if args.is_padding_step or not isinstance(loss, torch.Tensor):  # refused by the trainer
            return
        detached = loss.detach()
        self._losses.setdefault(args.optimizer_name or "", []).append(detached)
        if self._recorder is not None:
            self._recorder.before_backward(args, detached)
        if args.accelerator.num_processes > 1:
            args.attached_loss = loss * (detached * 0 + 1)  # times 1 or NaN

    def _observe(self, args: PipelineHookArgs) -> ObservedUpdate | None:
        """Return the due update; None if another hook skips it, or without any value to check."""
        losses = self._losses.pop(args.optimizer_name or "", [])
        steps = self._recorder.take() if self._recorder is not None else []
        if args.skip_reason is not None:
            return None
        norm = None if args.accelerator.scaler is not None else gradient_norm(args)
        if not losses and norm is None:
            return None
        order = args.grad_norm_order or 2.0
        return ObservedUpdate(
            losses,
            norm,
            order,
            args.gradients_changed,
            steps,
            args.progress,
            args.loss_weighting,
            args.optimizer_name,
        )

    def _check_now(self, args: PipelineHookArgs) -> None:
        self._leave_out(args)
        update = self._observe(args)
        if update is None:
            return
        values = pack(update.losses, update.norm).tolist()  # device sync, once an update
        finding = unpack(values, update.norm is not None)
        if finding.is_finite or self._is_rank_local(args, finding):
            return
        cfg = self.cfg
        parameters = bad_gradients(args) if finding.is_bad_norm else []
        folder = None
        if self._recorder is not None:
            kept = self._buffers.named() if self._buffers is not None else {}
            folder = self._recorder.write(args, update, finding, parameters or [], kept)
        problem = describe_problem(args, finding, update, parameters)
        skips, limit = self._skips.get(args.optimizer_name or "", 0), cfg.max_skips_in_a_row
        if cfg.policy == "raise" or (limit is not None and skips >= limit):
            outcome = "The update was not made: the weights are unchanged."
            if cfg.policy == "skip":
                outcome += f" The {skips} before it were skipped (max_skips_in_a_row={limit})."
            self._raise_or_roll_back(args, update, problem, outcome, folder, parameters or [])
            return
        self._bad_windows.append(args.global_step_id)
        self._skip(args, problem, folder, has_bad_loss=bool(finding.bad_losses))

    def _is_rank_local(self, args: PipelineHookArgs, finding: Finding) -> bool:
        """Return True, with a warning, if other ranks can't take part in a skip or a rollback."""
        if (self.cfg.policy, self.cfg.then) == ("raise", "raise"):
            return False
        if args.accelerator.num_processes == 1 or finding.is_bad_norm:
            return False
        logger.warning(
            "%s: %s on rank %d at %s, but all gradients are finite; the update is made, as on "
            "all other ranks",
            *(self.name, finding, args.accelerator.process_index, args.progress),
        )
        return True

    def _skip(
        self, args: PipelineHookArgs, problem: str, folder: Path | None, has_bad_loss: bool
    ) -> None:
        owner = args.optimizer_name or ""
        self._skips[owner] = count = self._skips.get(owner, 0) + 1
        self._set_skipped(args, problem)
        skipped = args.progress.skipped_optimizer_steps + 1
        args.metrics.publish("guard/skipped", skipped, reduce="max")
        if has_bad_loss or args.accelerator.is_main_process:
            where = f"; the batches are in {folder}" if folder is not None else ""
            logger.warning(
                "%s skips the update, %d in a row: %s%s",
                *(self.name, count, problem, where),
            )

    def _set_skipped(self, args: PipelineHookArgs, reason: str) -> None:
        args.skip_reason = reason
        if self._should_restore and self._buffers is not None:
            if args.optimizer_name is None:
                self._buffers.restore()
            else:  # a later backward pass of the step may need the buffers
                self._is_restore_due = True
        if args.scaler is not None:
            self._scaler_state = args.scaler.state_dict()

    def _restore_after_step(self, committed: bool) -> None:
        if self._is_restore_due and self._buffers is not None:
            self._buffers.restore()
        self._is_restore_due = False

    def _leave_out(self, args: PipelineHookArgs) -> None:
        """Skip the update of a window that led to a rollback; on the step path."""
        left_out = self._left_out
        if left_out and args.global_step_id in left_out and args.skip_reason is None:
            self._set_skipped(args, "left out after a rollback")
            if args.accelerator.is_main_process:
                logger.warning("%s leaves out the update at %s", self.name, args.progress)

    def _raise_or_roll_back(
        self,
        args: PipelineHookArgs,
        update: ObservedUpdate,
        problem: str,
        outcome: str,
        folder: Path | None,
        names: Sequence[str] = (),
    ) -> None:
        """Raise an error, or request a rollback instead.

        Raises:
            NonFiniteError: with ``then="raise"``, or after the last rollback.
        """
        cfg = self.cfg
        if cfg.then == "raise" or self.rollbacks >= cfg.max_rollbacks:
            if cfg.then == "rollback":
                outcome += (
                    f" The run was rolled back {self.rollbacks} times before "
                    f"(max_rollbacks={cfg.max_rollbacks})."
                )
            raise self._error(problem, outcome, folder, names, bool(args.run.optimizer_names))
        self.rollbacks += 1
        if cfg.skip_batch:
            windows = [*self._bad_windows, update.progress.global_step_id]
            parameters = {plain_name(n) for n, _ in plain_model(args.run).named_parameters()}
            spoilt = parameters.intersection(non_finite_weights(args.run, None))  # a collective
            if spoilt and cfg.read == "now" and self._last_committed is not None:
                # The last committed update spoilt the weights, with finite loss and gradients.
                windows = [self._last_committed]
            self._left_out.update(windows)
        args.skip_reason = problem
        count = f"rollback {self.rollbacks} of at most {cfg.max_rollbacks}"
        args.requests.rollback(f"{problem}; {count}", by=self.name)

    def _after_update(self, args: PipelineHookArgs) -> None:
        if args.update_committed:
            if self._skips:
                self._skips.pop(args.optimizer_name or "", None)
                self._bad_windows.clear()
            self._last_committed = args.global_step_id
        if self._scaler_state is not None:  # a NaN loss must not change the loss scale
            args.scaler.load_state_dict(self._scaler_state)
            self._scaler_state = None

    def _check_late(self, args: PipelineHookArgs) -> None:
        self._check_previous(args)
        self._leave_out(args)
        update = self._observe(args)
        if update is not None:
            self._delayed_read.start(pack(update.losses, update.norm))
            update.progress = copy.copy(update.progress)
            self._unread = update

    def _check_previous(self, args: PipelineHookArgs) -> None:
        """Raise or roll back if the previous update was non-finite."""
        update, self._unread = self._unread, None
        if update is None:
            return
        finding = unpack(self._delayed_read.read(), update.norm is not None)
        if finding.is_finite or self._is_rank_local(args, finding):
            return
        folder = None
        if self._recorder is not None:
            folder = self._recorder.write(args, update, finding, [], None)
        problem = describe_problem(args, finding, update, None)
        outcome = _ALREADY_APPLIED.format(self.cfg.read)
        self._raise_or_roll_back(args, update, problem, outcome, folder)

    def _check_at_logging_points(self, args: PipelineHookArgs) -> None:
        update = self._observe(args)
        losses, norm = (update.losses, update.norm) if update is not None else ((), None)
        self._logging_check.add(losses, norm)

    def _fail_at_logging_point(self, problem: str, update_id: int | None) -> NoReturn:
        when = "" if update_id is None else f" in update {update_id} (from 0, skipped ones counted)"
        raise NonFiniteError(
            f"{self.name}: {problem}{when}. {_ALREADY_APPLIED.format(self.cfg.read)} Resume from "
            "an earlier checkpoint, with read='now' to skip the update or quarantine its batches"
        )

    def _error(
        self,
        problem: str,
        outcome: str,
        folder: Path | None,
        parameters: Sequence[str],
        is_named: bool,
    ) -> NonFiniteError:
        where = "" if is_named else " Set quarantine to a folder to write the batches for a replay"
        if folder is not None:
            module = "robo_orchard_lab.pipeline.quarantine"
            where = (
                f" The batches are in {folder}; replay with "
                f"{module}.replay({str(folder)!r}, model, batch_processor)"
            )
        elif self._recorder is not None:
            where = " The batches were not written; the log says why"
        return NonFiniteError(f"{self.name}: {problem}. {outcome}{where}", folder, parameters)

    state_schema = StateSchema(
        STATE_VERSION,
        skips_in_a_row=Count | dict[Text, Count],
        rollbacks=Count,
        left_out=list[Count],
        losses=list[torch.Tensor] | dict[Text, list[torch.Tensor]],
        buffers=Tensors | None,
    )

    def state_dict(self) -> dict[str, Any]:
        kept = self._buffers.named() if self._losses and self._buffers is not None else None
        return {
            "version": STATE_VERSION,
            "skips_in_a_row": _by_optimizer(self._skips, 0),
            "rollbacks": self.rollbacks,
            "left_out": sorted(self._left_out),
            # of the open accumulation window:
            "losses": _by_optimizer(self._losses, []),
            "buffers": kept and {name: buffer.clone() for name, buffer in kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        skips, losses = state["skips_in_a_row"], state["losses"]
        self._skips = dict(skips) if isinstance(skips, Mapping) else {"": skips}
        # Of this process after a rollback, of the checkpoint after a resume.
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        self._left_out |= set(state["left_out"])
        self._bad_windows, self._last_committed, self._unread = [], None, None
        if self._recorder is not None:
            self._recorder.take()
        losses = losses if isinstance(losses, Mapping) else {"": losses}
        self._losses = {name: list(of_one) for name, of_one in losses.items() if of_one}
        if self._buffers is not None and state["buffers"] is not None:
            self._buffers.load(state["buffers"])


def _by_optimizer(values: Mapping[str, Any], default: Any) -> Any:
    """Return a copy of values by optimizer; with one optimizer, its value."""
    if values.keys() <= {""}:
        return copy.copy(values.get("", default))
    return {name: copy.copy(value) for name, value in values.items()}


class NonFiniteGuardConfig(PipelineHooksConfig[NonFiniteGuard]):
    """Policy for non-finite updates, time of the check, and quarantine.

    >>> NonFiniteGuardConfig(policy="skip", quarantine="quarantine", sample_ids="index")().name
    'NonFiniteGuard'
    """

    class_type: type[NonFiniteGuard] = NonFiniteGuard
    policy: Literal["raise", "skip"] = Field(
        default="raise", description="End the run ('raise') or skip the update ('skip')."
    )
    max_skips_in_a_row: int | None = Field(
        default=10,
        ge=1,
        description="With policy='skip': most consecutive skipped updates; the next bad update "
        "raises. None for no limit.",
    )
    then: Literal["raise", "rollback"] = Field(
        default="raise",
        description="With policy='raise', or after too many skips: end the run ('raise'), or "
        "continue from the newest healthy checkpoint ('rollback').",
    )
    max_rollbacks: int = Field(
        default=3, ge=1, description="With then='rollback': most rollbacks of the run."
    )
    skip_batch: bool = Field(
        default=False,
        description="With then='rollback': skip the updates that led to the rollback when the run "
        "reaches them again.",
    )
    read: Literal["now", "one update late", "at logging points"] = Field(
        default="now",
        description="Time of the check: before the update ('now', a device sync), before the "
        "next update, or at the next logging point. The latter two require policy='raise', and "
        "the bad update has already been made.",
    )
    restore_buffers: bool = Field(
        default=True,
        description="With policy='skip': restore the model's buffers, too; costs a copy of the "
        "buffers before each accumulation window.",
    )
    quarantine: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description="Folder for the batches of non-finite updates, for a replay; each in "
        "step_<last global step>. None writes nothing.",
    )
    max_quarantined: int = Field(
        default=3, ge=1, description="Most quarantined updates per rank; the first ones are kept."
    )
    sample_ids: str | int | None = Field(
        default=None,
        description="Key or index of the sample ids in a batch, for messages and quarantine; "
        "None for no ids.",
    )

    optimizers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="With several optimizers, the names of those whose updates to check; None "
        "checks all.",
    )

    def __post_init__(self) -> None:
        if self.policy == "skip" and self.read != "now":
            raise ValueError(
                f"policy='skip' needs read='now', got read={self.read!r}: an update can be skipped "
                "only before the update is made"
            )
        if self.then == "rollback" and self.read == "at logging points":
            raise ValueError(
                "then='rollback' needs read='now' or read='one update late', got read='at logging "
                "points': the update is unknown by then"
            )
        if self.skip_batch and self.then != "rollback":
            raise ValueError("skip_batch=True needs then='rollback', got then='raise'")
        if self.quarantine is not None and self.read == "at logging points":
            raise ValueError(
                "quarantine needs read='now' or read='one update late', got read='at logging "
                "points': the batches have been freed by then"
            )
