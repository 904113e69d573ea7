"""The hook that owns the optimizer and the schedule."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from robo_orchard_core.utils.hook import HookContext
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks

logger = logging.getLogger(__name__)

ScheduleUnit: TypeAlias = Literal["optimizer_step", "epoch"]
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

        committed = optimizer.step()
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
        schedule_every: when the schedule moves. By default once for each committed update,
            whatever the number of processes; ``ReduceLROnPlateau`` once an epoch, with the mean
            loss of the epoch's steps on this rank (once for each update, it gets the loss of the
            step that ended the window, and reading it waits for the device each time).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        hooks: PipelineHooks,
        schedule_every: ScheduleUnit | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = _unwrap_optimizer(accelerator, optimizer)
        self.lr_scheduler = (
            lr_scheduler.scheduler
            if isinstance(lr_scheduler, AcceleratedScheduler)
            else lr_scheduler
        )
        self._channel = hooks.channel("on_optimizer_step")
        # Called on the step path, so looked up once. Not every optimizer takes set_to_none.
        takes_set_to_none = "set_to_none" in inspect.signature(self.optimizer.zero_grad).parameters
        wrapped = isinstance(self.optimizer, AcceleratedOptimizer)  # asks by itself
        self._zero_grad_options = {"set_to_none": True} if takes_set_to_none and not wrapped else {}

        plateau = isinstance(self.lr_scheduler, ReduceLROnPlateau)
        self.schedule_every: ScheduleUnit = schedule_every or (
            "epoch" if plateau else "optimizer_step"
        )
        self._mean_loss = _MeanLoss() if plateau and self.schedule_every == "epoch" else None

        self.register_hook("on_step", HookContext.from_callable(after=self._optimizer_step))
        if self._mean_loss is not None:
            self.register_hook("on_batch", HookContext.from_callable(after=self._mean_loss.add))
        if self.lr_scheduler is not None and self.schedule_every == "epoch":
            self.register_hook("on_epoch", HookContext.from_callable(after=self._epoch_schedule))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(**self._zero_grad_options)

    def _optimizer_step(self, args: PipelineHookArgs) -> None:
        if args.at_accumulation_boundary and args.exception is None:
            self._channel.run(args, self._update)

    def _update(self, args: PipelineHookArgs) -> None:
        optimizer = self.optimizer
        optimizer.step()
        committed = not (isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped)
        if committed and self.lr_scheduler is not None and self.schedule_every == "optimizer_step":
            self._move_schedule(args.loss)
        self.zero_grad()
        args.progress.finish_optimizer_step(committed)
        args.update_committed = committed

    def _epoch_schedule(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None:
            self._move_schedule(self._mean_loss.take() if self._mean_loss else None)

    def _move_schedule(self, loss: torch.Tensor | None) -> None:
        scheduler: Any = self.lr_scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            assert loss is not None  # a step with a backward pass has one
            scheduler.step(loss.item())  # waits for the device
            return
        if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps:
            return  # it raises when moved past its end; it stays there instead
        scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        mean_loss = self._mean_loss
        return {"mean_loss": mean_loss.state_dict()} if mean_loss else {}

    def load_state_dict(self, state: Any) -> None:
        if self._mean_loss:
            self._mean_loss.load_state_dict(state["mean_loss"])


class _MeanLoss:
    """The mean of the losses since it was last taken, on their device."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, args: PipelineHookArgs) -> None:
        if args.loss is not None:
            loss = args.loss.double() if args.loss.device.type != "mps" else args.loss
            self._sum = loss if self._sum is None else self._sum + loss
            self._count += 1

    def take(self) -> torch.Tensor | None:
        mean = None if self._sum is None else self._sum / self._count
        self._sum, self._count = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._count = state["sum"], state["count"]


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
