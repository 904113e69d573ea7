"""OptimizerHook: steps the optimizer and the LR scheduler; NamedOptimizersHook: several of them."""

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

from robo_orchard_lab.pipeline.context import NamedUpdates, PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import join_by_rank
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.gradient_norm import unscale_gradients
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, WeightedSum
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.state_schema import StateSchema, Text

logger = job_logger(__name__)

LRSchedulerUnit: TypeAlias = Literal["optimizer_step", "epoch"]
"""When the LR scheduler steps: once per committed optimizer step, or once per epoch."""

# Accelerate's optimizer wrapper only forwards here. Elsewhere (DeepSpeed, Megatron-LM, XLA), and
# with a gradient scaler, it decides whether to step.
_FORWARDING = frozenset(
    {
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.FSDP,
    }
)


class OptimizerHook(PipelineHooks):
    """Hook that steps the optimizer at each accumulation boundary; outermost on ``on_step``.

    Its ``after`` opens ``on_optimizer_step`` around this::

        committed = args.skip_reason is None and optimizer.step()
        if committed: lr_scheduler.step()      # or once an epoch
        optimizer.zero_grad()
        progress.finish_optimizer_step(committed)

    The update, its gradient norm and its clipping are those of the optimizer's parameters.
    Gradients of the model's other parameters are dropped after ``on_optimizer_step``.

    ``after``-hooks of ``on_step`` see the gradients; those of ``on_optimizer_step`` see the new
    weights and ``args.update_committed``. A failed step makes no optimizer step.

    With several optimizers, :class:`NamedOptimizersHook` has one such hook for each, and opens
    ``on_optimizer_step``.

    Args:
        accelerator: decides whether the optimizer can be called without Accelerate's wrapper,
            which costs more than a small model's step (benchmarks/README.md).
        optimizer, lr_scheduler: prepared by the accelerator or not.
        hooks: hooks whose ``on_optimizer_step`` is opened.
        lr_scheduler_every: when the LR scheduler steps. Defaults to once per committed optimizer
            step, at any world size, and for ``ReduceLROnPlateau`` to once per epoch, with the mean
            loss over all ranks' steps since its last step: one collective and one device sync.
        lr_scheduler_monitor: metric that ``ReduceLROnPlateau`` follows instead of the mean loss,
            such as ``"eval/val/loss"``. The LR scheduler steps with each new value, at the commit
            point that reads the value, on all ranks; NaN and infinities count as no improvement.
        optimizer_name: name of one of several optimizers.

    Raises:
        PipelineConfigError: options contradict each other or the LR scheduler, or the optimizer
            needs a closure, as LBFGS does.
    """

    reads = ("gradients", "skip_reason")
    changes = ("model.weights", "gradients", "optimizer state", "update_committed")
    requests = ()

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        hooks: PipelineHooks,
        lr_scheduler_every: LRSchedulerUnit | None = None,
        lr_scheduler_monitor: str | None = None,
        optimizer_name: str = "",
    ) -> None:
        super().__init__(f"{type(self).__name__}.{optimizer_name}" if optimizer_name else None)
        self.optimizer_name = optimizer_name
        self.optimizer = _unwrap_optimizer(accelerator, optimizer)
        _refuse_closures(getattr(optimizer, "optimizer", optimizer))
        self.lr_scheduler = (
            lr_scheduler.scheduler
            if isinstance(lr_scheduler, AcceleratedScheduler)
            else lr_scheduler
        )
        self._accelerator = accelerator
        self._channel = hooks.get_channel("on_optimizer_step")
        # With a gradient scaler, Accelerate's wrapper knows if it has stepped.
        self._wrapper = self.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else None
        self._zero_grad = _zero_grad_of(self.optimizer)
        self._body = self._update
        self._outside: list[torch.nn.Parameter] = []

        options = lr_scheduler_every, lr_scheduler_monitor
        check_lr_scheduler(self.lr_scheduler, *options, optimizer_name)
        is_plateau = isinstance(self.lr_scheduler, ReduceLROnPlateau)
        self.lr_scheduler_every: LRSchedulerUnit = lr_scheduler_every or (
            "epoch" if is_plateau else "optimizer_step"
        )
        self._mean_loss: WeightedSum | None = None  # of the steps since ReduceLROnPlateau stepped
        self._step_lr: Callable[[], Any] | None = getattr(self.lr_scheduler, "step", None)
        if isinstance(self.lr_scheduler, OneCycleLR):
            self._step_lr = partial(_step_to_the_end, self.lr_scheduler)
        if lr_scheduler_monitor is not None:
            owner = f"lr_scheduler.{optimizer_name}" if optimizer_name else "lr_scheduler"
            subscribed = (lr_scheduler_monitor, self._follow, owner)
            self.register_for_loop(lambda args: args.metrics.subscribe(*subscribed))
            self._step_lr = None
        elif is_plateau:
            self._mean_loss = WeightedSum()
            self._step_lr = self._step_with_mean_loss
        if self.lr_scheduler is not None:
            self.declare_effects(changes=["learning rates"])
        if self._mean_loss is not None:
            self.declare_effects(reads=["loss", "loss_weight"])
        elif is_plateau:
            self.declare_effects(reads=["metrics"])
        self._after_update = self._step_lr if self.lr_scheduler_every == "optimizer_step" else None

        if not optimizer_name:
            self.on_step.after(self._optimizer_step)
        if self._mean_loss is not None and optimizer_name:
            self.on_model_backward.after(self._add_loss)
        elif self._mean_loss is not None:
            self.on_batch.after(self._add_loss)
        if self._step_lr is not None and self.lr_scheduler_every == "epoch":
            self.on_epoch.after(self._end_epoch)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer by its name, ``""`` for the only optimizer."""
        return {self.optimizer_name: self.optimizer}

    @property
    def lr_schedulers(self) -> dict[str, torch.optim.lr_scheduler.LRScheduler]:
        """LR schedulers by the names of their optimizers; empty without LR schedulers."""
        return {} if self.lr_scheduler is None else {self.optimizer_name: self.lr_scheduler}

    def _follow(self, found: MetricValue) -> None:
        """Step ReduceLROnPlateau with a value of the monitored metric."""
        assert isinstance(self.lr_scheduler, ReduceLROnPlateau)  # checked in the constructor
        self.lr_scheduler.step(found.value if math.isfinite(found.value) else math.nan)

    def step_lr_scheduler(self, times: int) -> None:
        """Step the LR scheduler; ReduceLROnPlateau, which depends on metrics, stays."""
        if self._step_lr is not None and not isinstance(self.lr_scheduler, ReduceLROnPlateau):
            for _ in range(times):
                self._step_lr()

    def step_lr_scheduler_to(self, progress: TrainerProgress) -> None:
        """Step a new LR scheduler as often as a run up to these counters does."""
        updates = progress.optimizer_steps.get(self.optimizer_name, progress.optimizer_step_id)
        is_by_epoch = self.lr_scheduler_every == "epoch"
        self.step_lr_scheduler(progress.epoch_id if is_by_epoch else updates)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self._zero_grad()
        for parameter in self._outside:
            parameter.grad = None

    def drop_gradients_outside(self, model: torch.nn.Module) -> None:
        """Also drop the gradients of a model's parameters that the optimizer lacks, if any."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._outside = [parameter for parameter in model.parameters() if id(parameter) not in held]

    def before_first_update(self, check: Callable[[], None]) -> None:
        """Call a function before the first optimizer step that is not skipped."""

        def check_and_update(args: PipelineHookArgs) -> None:
            if args.skip_reason is None:
                check()
                self._body = self._update
            self._update(args)

        self._body = check_and_update

    def make_update(self, args: PipelineHookArgs) -> None:
        """Open ``on_optimizer_step`` around an update."""
        self._channel.run(args, self._body)

    def _optimizer_step(self, args: PipelineHookArgs) -> None:
        is_due = args._at_accumulation_boundary and args._update_committed is None
        if is_due and args._exception is None:  # not due if all batches of a window were skipped
            self._channel.run(args, self._body)
            for parameter in self._outside:  # here, since hooks may use them until now
                parameter.grad = None

    def _update(self, args: PipelineHookArgs) -> None:
        if args.skip_reason is not None:
            self._skip(args)
            return
        self.optimizer.step()
        committed = not (self._wrapper is not None and self._wrapper.step_was_skipped)
        if committed and self._after_update is not None:
            self._after_update()
        self._zero_grad()
        if args._named is None:
            args._run.progress.finish_optimizer_step(committed)
        else:
            self._finish_named(args, args._named, committed)
        args._update_committed = committed
        if not committed:
            self._record_skip(args, "non-finite gradients, found by the gradient scaler")

    def _skip(self, args: PipelineHookArgs) -> None:
        if args.scaler is not None:
            unscale_gradients(args)  # scaler.update() needs an unscale before
            args.scaler.update()
        self._zero_grad()
        if args._named is None:
            args._run.progress.finish_optimizer_step(committed=False)
        else:
            self._finish_named(args, args._named, committed=False)
        args._update_committed = False
        self._record_skip(args, str(args.skip_reason))

    def _record_skip(self, args: PipelineHookArgs, reason: str) -> None:
        name = f"{self.optimizer_name}: " if self.optimizer_name else ""
        args._run.state_file.events.add("skipped update", name + reason)

    def _finish_named(self, args: PipelineHookArgs, named: NamedUpdates, committed: bool) -> None:
        progress, is_counted = args._run.progress, named.is_counted
        progress.finish_named_update(self.optimizer_name, committed, is_counted=is_counted)
        named.is_counted = is_counted or committed

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None and self._step_lr is not None:
            self._step_lr()

    def _add_loss(self, args: PipelineHookArgs) -> None:
        is_own = (args.optimizer_name or "") == self.optimizer_name
        if self._mean_loss and is_own and args.loss is not None and not args.is_padding_step:
            self._mean_loss.add(args.loss, args.loss_weight)

    def _step_with_mean_loss(self) -> None:
        """Step ReduceLROnPlateau with the mean loss of all ranks since its last step."""
        assert isinstance(self.lr_scheduler, ReduceLROnPlateau)
        assert self._mean_loss is not None
        accelerator = self._accelerator
        total = self._mean_loss.to_tensor(accelerator.device)
        self._mean_loss = WeightedSum()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")  # a collective
        loss, weight = total.tolist()  # waits for the device
        if weight:  # else an epoch without a loss of this optimizer, which is no worse epoch
            self.lr_scheduler.step(loss / weight)

    state_schema = StateSchema(optional=["mean_loss"], mean_loss=WeightedSum.schema.type)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_loss": self._mean_loss.state_dict()} if self._mean_loss else {}

    def load_state_dict(self, state: Any) -> None:
        if self._mean_loss and "mean_loss" in state:  # a run with a monitor saves no mean
            self._mean_loss.load_state_dict(state["mean_loss"], self._accelerator.device)

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        """Merge the ranks' mean losses; the mean over all ranks is unchanged."""
        return join_by_rank(states, processes, self._joined)

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._mean_loss is None or any("mean_loss" not in state for state in states):
            return {}
        joined = WeightedSum()
        for state in states:
            part = WeightedSum()
            part.load_state_dict(state["mean_loss"], None)
            joined.merge(part)
        return {"mean_loss": joined.state_dict()}


class NamedOptimizersHook(PipelineHooks):
    """Hook of several optimizers, each with its own `OptimizerHook`; outermost on ``on_step``.

    The trainer calls :meth:`update` for a named step at an accumulation boundary. All other
    optimizers with a loss in the window are stepped in the ``after`` of ``on_step``, in the order
    of their losses.

    Args:
        hooks: hook of each optimizer.
        average: averages the gradients of the named optimizers over the ranks: those of a named
            step, or all that are left at the end of a step. None in one process.
    """

    reads = ("losses", "gradients", "skip_reason")
    changes = ("model.weights", "gradients", "optimizer state", "update_committed")
    requests = ()

    def __init__(
        self,
        hooks: Sequence[OptimizerHook],
        average: Callable[[Mapping[str, torch.optim.Optimizer], bool], None] | None,
    ) -> None:
        super().__init__()
        self._hooks = {hook.optimizer_name: hook for hook in hooks}
        self._average = average
        self._pending: dict[str, None] = {}  # optimizers with a loss in the open window
        self._without_loss = dict.fromkeys(self._hooks)  # until the first loss in this process
        self.on_step.after(self._end_step)
        self.on_epoch.after(self._warn_of_unused)
        if self.lr_schedulers:
            self.declare_effects(changes=["learning rates"])
        for hook in hooks:
            self.register_pipeline_hooks(hook)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers by name."""
        return {name: hook.optimizer for name, hook in self._hooks.items()}

    @property
    def lr_schedulers(self) -> dict[str, torch.optim.lr_scheduler.LRScheduler]:
        """LR schedulers by the names of their optimizers."""
        return {k: v for hook in self._hooks.values() for k, v in hook.lr_schedulers.items()}

    def zero_grad(self) -> None:
        """Set all gradients to None, and forget the open window."""
        self._pending.clear()
        for hook in self._hooks.values():
            hook.zero_grad()

    def add_loss(self, name: str) -> None:
        """Record that an optimizer has a loss in the open window."""
        self._pending[name] = None
        self._without_loss.pop(name, None)

    def update(self, args: PipelineHookArgs) -> None:
        """Step the optimizer of the current entry."""
        assert args.optimizer_name is not None
        hook = self._hooks[args.optimizer_name]
        del self._pending[hook.optimizer_name]
        if self._average is not None:
            self._average({hook.optimizer_name: hook.optimizer}, False)  # a collective
        self._make_update(args, hook)

    def _end_step(self, args: PipelineHookArgs) -> None:
        is_due = args._at_accumulation_boundary and args._update_committed is None
        if not is_due or args._exception is not None:
            return
        pending, self._pending = self._pending, {}
        if self._average is not None:
            optimizers = {name: self._hooks[name].optimizer for name in pending}
            self._average(optimizers, True)  # a collective
        for name in pending:
            args.begin_entry(name, args.losses.get(name))
            self._make_update(args, self._hooks[name])
        args.begin_entry(None)
        assert args._named is not None  # set in each step
        for function in tuple(args.run.after_updates.values()):
            function(args._named.is_counted)

    def check_used(self, run: PipelineRun, *, is_end: bool = True) -> None:
        """Warn of optimizers without a loss so far, or raise an error at the end of a run.

        A run that ends within its first epoch gets the warning, too: an optimizer may have a loss
        in few steps.

        Raises:
            BatchProcessorError: the message names the optimizers.
        """
        progress = run.progress
        unused = [name for name in self._without_loss if not progress.optimizer_steps[name]]
        if not unused:
            return
        count, unit = progress.epoch_id if is_end else 1, "epoch"
        if not count:
            count, unit = progress.global_step_id, "step"
        problem = (
            f"{run.locate(f'optimizer.{unused[0]}')}: expected a loss for each optimizer, found "
            f"none for {', '.join(unused)} in {count} {unit}{'s' * (count > 1)}; yield "
            f"{unused[0]!r}, loss from the batch processor, or leave the optimizer out"
        )
        if is_end and progress.epoch_id:
            raise BatchProcessorError(problem)
        logger.warning("%s", problem)

    def _warn_of_unused(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.epoch_id == 0 and args.exception is None:
            self.check_used(args.run, is_end=False)

    def _make_update(self, args: PipelineHookArgs, hook: OptimizerHook) -> None:
        parameters = trainable_parameters(hook.optimizer)
        if parameters and all(parameter.grad is None for parameter in parameters):
            name = hook.optimizer_name
            raise BatchProcessorError(
                f"the loss for {name!r} reaches none of its {len(parameters)} parameters: expected "
                f"a gradient, found None for each; compute the loss with the parameters of "
                f"optimizer[{name!r}], without detach(), or leave the loss out of this step"
            )
        hook.make_update(args)

    state_schema = StateSchema(pending=list[Text])

    def state_dict(self) -> dict[str, Any]:
        return {"pending": list(self._pending)}

    def load_state_dict(self, state: Any) -> None:
        self._pending = dict.fromkeys(name for name in state["pending"] if name in self._hooks)


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the optimizer's parameters that require a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _unwrap_optimizer(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Return the optimizer without Accelerate's wrapper, if the wrapper only forwards."""
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
            f"{type(optimizer).__name__}.step needs a closure that evaluates the model again, "
            "which the trainer does not pass; use an optimizer that steps on the gradients"
        )


def check_lr_scheduler(
    scheduler: Any, every: LRSchedulerUnit | None, monitor: str | None, optimizer_name: str = ""
) -> None:
    """Raise a PipelineConfigError if options contradict each other or the LR scheduler."""
    units = get_args(LRSchedulerUnit)
    of = f"[{optimizer_name!r}]" if optimizer_name else ""
    if every is not None and every not in units:
        raise PipelineConfigError(
            f"lr_scheduler_every{of} must be one of {', '.join(map(repr, units))}, got {every!r}"
        )
    if every is not None and scheduler is None:
        raise PipelineConfigError(
            f"lr_scheduler_every{of}={every!r}: expected an LR scheduler, found none; "
            f"pass lr_scheduler{of}=..., or omit lr_scheduler_every{of}"
        )
    if monitor is not None and not isinstance(scheduler, ReduceLROnPlateau):
        raise PipelineConfigError(
            f"lr_scheduler_monitor{of}={monitor!r} is for ReduceLROnPlateau, found "
            f"{'no LR scheduler' if scheduler is None else type(scheduler).__name__}; omit it"
        )
    if monitor is not None and every is not None:
        raise PipelineConfigError(
            f"lr_scheduler_monitor{of}={monitor!r} steps the LR scheduler with each value, found "
            f"also lr_scheduler_every{of}={every!r}; omit one of them"
        )


def _step_to_the_end(scheduler: OneCycleLR) -> None:
    """Step OneCycleLR, which raises when stepped past its end."""
    if scheduler.last_epoch < scheduler.total_steps:
        scheduler.step()


def _zero_grad_of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return the function that drops the gradients, with ``set_to_none`` where supported."""
    option = inspect.signature(optimizer.zero_grad).parameters.get("set_to_none")
    if option is None or option.default in (True, None):  # None: Accelerate's wrapper decides
        return optimizer.zero_grad
    return partial(optimizer.zero_grad, set_to_none=True)
