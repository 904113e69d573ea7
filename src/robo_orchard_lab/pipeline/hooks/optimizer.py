"""The hook that owns the optimizer and the schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import joined_by_rank
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.gradient_norm import unscale_gradients
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import WeightedSum

LRSchedulerUnit: TypeAlias = Literal["optimizer_step", "epoch"]
"""When the learning rate schedule moves: once for each committed update, or once an epoch."""

# Here the wrapper around the optimizer only forwards. Elsewhere (DeepSpeed, Megatron-LM, XLA) it
# decides, as it does with a gradient scaler.
_FORWARDING = frozenset(
    {
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.FSDP,
    }
)


class OptimizerHook(PipelineHooks):
    """Updates the weights at each accumulation boundary; the outermost hook on ``on_step``.

    Its ``after`` opens ``on_optimizer_step`` around this::

        committed = args.skip_reason is None and optimizer.step()
        if committed: lr_scheduler.step()      # or once an epoch
        optimizer.zero_grad()
        progress.finish_optimizer_step(committed)

    So ``after``-hooks of ``on_step`` see the gradients, those of ``on_optimizer_step`` the new
    weights and ``args.update_committed``. Nothing is updated when the step failed.

    Args:
        accelerator: decides whether the optimizer can be called without Accelerate's wrapper,
            which takes longer than a small model's step (benchmarks/README.md).
        optimizer: as prepared by the accelerator, or not.
        lr_scheduler: as prepared by the accelerator, or not; None for a constant rate.
        hooks: whose ``on_optimizer_step`` to open.
        lr_scheduler_every: when the schedule moves. By default once for each committed update,
            whatever the number of processes, and for ``ReduceLROnPlateau`` once an epoch. That
            one gets the mean loss of all ranks' steps since it last moved: one exchange between
            the ranks, and waiting for the device, for each move.

    Raises:
        PipelineConfigError: ``lr_scheduler_every`` is another word, or the optimizer can't step
            without a closure, as LBFGS can't, which evaluates the model anew within its step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        hooks: PipelineHooks,
        lr_scheduler_every: LRSchedulerUnit | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = _unwrap_optimizer(accelerator, optimizer)
        _refuse_closures(getattr(optimizer, "optimizer", optimizer))
        self.lr_scheduler = (
            lr_scheduler.scheduler
            if isinstance(lr_scheduler, AcceleratedScheduler)
            else lr_scheduler
        )
        self._channel = hooks.get_channel("on_optimizer_step")
        # With a gradient scaler and the like, Accelerate's wrapper knows whether it has stepped.
        self._wrapper = self.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else None
        self._zero_grad = _zero_grad_of(self.optimizer)

        plateau = isinstance(self.lr_scheduler, ReduceLROnPlateau)
        self.lr_scheduler_every: LRSchedulerUnit = lr_scheduler_every or (
            "epoch" if plateau else "optimizer_step"
        )
        if self.lr_scheduler_every not in get_args(LRSchedulerUnit):
            raise PipelineConfigError(
                "lr_scheduler_every must be one of "
                f"{', '.join(map(repr, get_args(LRSchedulerUnit)))}, got {lr_scheduler_every!r}"
            )
        self._mean_loss = _MeanLoss(accelerator) if plateau else None
        move = _move_of(self.lr_scheduler, self._mean_loss)
        self._after_update = move if self.lr_scheduler_every == "optimizer_step" else None
        self._after_epoch = move if self.lr_scheduler_every == "epoch" else None

        self.register_hook("on_step", HookContext.from_callable(after=self._optimizer_step))
        if self._mean_loss is not None:
            self.register_hook("on_batch", HookContext.from_callable(after=self._mean_loss.add))
        if self._after_epoch is not None:
            self.register_hook("on_epoch", HookContext.from_callable(after=self._end_epoch))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._zero_grad()

    def _optimizer_step(self, args: PipelineHookArgs) -> None:
        if args.at_accumulation_boundary and args.exception is None:
            self._channel.run(args, self._update)

    def _update(self, args: PipelineHookArgs) -> None:
        if args.skip_reason is not None:
            self._skip(args)
            return
        self.optimizer.step()
        committed = not (self._wrapper is not None and self._wrapper.step_was_skipped)
        if committed and self._after_update is not None:
            self._after_update()
        self._zero_grad()
        args.run.progress.finish_optimizer_step(committed)
        args.update_committed = committed

    def _skip(self, args: PipelineHookArgs) -> None:
        scaler = args.accelerator.scaler
        if scaler is not None:
            unscale_gradients(args.accelerator)  # so that it has something to update from
            scaler.update()
        self._zero_grad()
        args.run.progress.finish_optimizer_step(committed=False)
        args.update_committed = False

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None and self._after_epoch is not None:
            self._after_epoch()

    def state_dict(self) -> dict[str, Any]:
        mean_loss = self._mean_loss
        return {"mean_loss": mean_loss.state_dict()} if mean_loss else {}

    def load_state_dict(self, state: Any) -> None:
        if self._mean_loss:
            self._mean_loss.load_state_dict(state["mean_loss"])

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        """The mean of the losses is that of all ranks', whichever rank has taken them in."""
        return joined_by_rank(states, processes, self._joined)

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._mean_loss is None:
            return {}
        return {"mean_loss": self._mean_loss.joined([state["mean_loss"] for state in states])}


class _MeanLoss:
    """The weighted mean of the losses since it was last taken, on their device, of all ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sum = WeightedSum()

    def add(self, args: PipelineHookArgs) -> None:
        if args.loss is not None and not args.is_padding_step:
            self._sum.add(args.loss, args.loss_weight)

    def take(self) -> float:
        accelerator = self._accelerator
        total = self._sum.to_tensor(accelerator.device)
        self._sum = WeightedSum()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")  # a collective
        loss, weight = total.tolist()  # waits for the device
        return loss / weight if weight else math.nan

    @staticmethod
    def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One state of those of several ranks."""
        whole = WeightedSum()
        for state in states:
            part = WeightedSum()
            part.load_state_dict(state, None)
            whole.merge(part)
        return whole.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._sum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum.load_state_dict(state, self._accelerator.device)


def _unwrap_optimizer(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """The optimizer to call: without Accelerate's wrapper where that has nothing to decide."""
    if (
        isinstance(optimizer, AcceleratedOptimizer)
        and accelerator.scaler is None
        and accelerator.distributed_type in _FORWARDING
        and not accelerator.has_lomo_optimizer
    ):
        inner: torch.optim.Optimizer = optimizer.optimizer
        return inner
    return optimizer


def _refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise PipelineConfigError(
            f"{type(optimizer).__name__}.step needs a closure that evaluates the model anew, "
            "which the trainer does not give; use an optimizer that steps on the gradients"
        )


def _move_of(
    scheduler: torch.optim.lr_scheduler.LRScheduler | None, mean_loss: _MeanLoss | None
) -> Callable[[], Any] | None:
    """What moves the schedule by one; None without a schedule."""
    if isinstance(scheduler, ReduceLROnPlateau):
        assert mean_loss is not None
        return lambda: scheduler.step(mean_loss.take())  # waits for the device
    if isinstance(scheduler, OneCycleLR):

        def move_to_the_end() -> None:
            # It raises when moved past its end, where an epoch had more updates than foreseen.
            if scheduler.last_epoch < scheduler.total_steps:
                scheduler.step()

        return move_to_the_end
    return None if scheduler is None else scheduler.step


def _zero_grad_of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Dropping the gradients, by freeing them wherever the optimizer knows how."""
    option = inspect.signature(optimizer.zero_grad).parameters.get("set_to_none")
    if option is None or option.default in (True, None):  # None: Accelerate's wrapper finds out
        return optimizer.zero_grad
    return partial(optimizer.zero_grad, set_to_none=True)
