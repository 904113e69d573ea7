"""LightningModuleProcessor: trains a LightningModule as it is, without Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import (
    BatchProcessorError,
    PipelineConfigError,
    PipelineStateError,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.lightning.hooks import LightningModuleHooks, TrainerOfModule
from robo_orchard_lab.pipeline.lightning.module import (
    HOOKS,
    Scheduler,
    check_module,
    is_overridden,
    lightning_bases,
    parse_optimizers,
    step_function,
)
from robo_orchard_lab.pipeline.metrics.accumulators import Reduction

_REDUCTIONS: dict[str, Reduction] = {
    "mean": "mean",
    "avg": "mean",
    "sum": "sum",
    "min": "min",
    "max": "max",
}
_STEPS = {"training_step", "validation_step", "test_step", "predict_step"}
_EVALUATED_BATCH = (
    *("on_validation_batch_start", "validation_step", "on_validation_batch_end", "test_step"),
)


class LightningModuleProcessor(SimpleBatchProcessor):
    """Batch processor of a LightningModule, which stays as it is.

    ::

        module = MyLightningModule()
        adapter = LightningModuleProcessor(module)
        HookBasedTrainer(
            Accelerator(),
            module,
            train_loader,
            adapter,
            **adapter.optimizers(),
            hooks=[adapter.hooks(), ValidationHookConfig()(dataloaders={"val": val_loader})],
            max_epoch=3,
        )()

    The adapter calls the module's steps and hooks, and replaces the module's ``log``, ``log_dict``,
    ``optimizers`` and ``trainer``; docs/how_to/migrate_lightning.md lists hooks and their order.
    Values of ``self.log`` become metrics: means over the samples of all ranks, per logging point
    with ``on_step``, per epoch with ``on_epoch``, and of an evaluation as ``eval/<loader>/<name>``.

    Args:
        module: a LightningModule; its ``setup("fit")`` and ``configure_model()`` are called.
        trainer: values of ``self.trainer`` by name, for a module that reads them before the run,
            such as ``{"max_epochs": 3, "estimated_stepping_batches": 300}`` in
            ``configure_optimizers``, or that reads values that the adapter does not know.
        leave_out: overridden hooks to leave out, although nothing replaces them.

    Raises:
        PipelineConfigError: the object is no LightningModule, lacks a method, or overrides a hook
            that is not called here; the message states a remedy.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        trainer: Mapping[str, Any] | None = None,
        leave_out: Iterable[str] = (),
    ) -> None:
        super().__init__()
        _remove_adapter(module)
        self._left_out = {*leave_out}
        check_module(module, self._left_out)
        self.module = cast(Any, module)
        self.is_manual = not self.module.automatic_optimization
        """True if the module makes its updates itself."""
        self._own = {name for name in HOOKS if is_overridden(module, name)} - self._left_out
        self._steps = {name: step_function(module, name) for name in self._own & _STEPS}
        self._scope = ""  # hook of the module that runs
        self.updates: Any = None
        """Of a module that makes its updates itself: the trainer's backward passes and updates."""
        self._evaluated: dict[str, Any] = {}  # values of an evaluated batch
        self._sizes: set[int] = set()  # values of batch_size in it
        self._configured: tuple[list[Optimizer], list[Scheduler]] | None = None
        self._bundle = LightningModuleHooks(self, trainer or {})
        self._trainer: Any = TrainerOfModule(self, self._bundle, trainer or {})
        self.module.trainer = self._trainer
        # Attributes of an instance precede the methods of its class.
        methods: dict[str, Any] = {
            "log": self._log,
            "log_dict": self._log_dict,
            "optimizers": self._optimizers,
        }
        if self.is_manual:
            methods |= {
                "manual_backward": self._manual_backward,
                "clip_gradients": self._clip_gradients,
            }
            self.forward_with_updates = self._forward_with_updates
        for part in module.modules():
            if lightning_bases(part):
                vars(part).update(methods)
        self.call("setup", stage="fit")
        self.call("configure_model")

    def __deepcopy__(self, memo: Any) -> LightningModuleProcessor:
        return self  # a copy of the module logs to the same run

    def hooks(self) -> PipelineHooks:
        """Return the hooks that call those of the module; pass them to the trainer, first."""
        return self._bundle

    def optimizers(self) -> dict[str, Any]:
        """Return the trainer's arguments that ``configure_optimizers`` describes.

        A ReduceLROnPlateau of a module with ``validation_step`` follows ``eval/val/<monitor>``,
        unless the monitor begins with ``eval/``. With manual optimization, optimizers are named
        ``optimizer_0``, ``optimizer_1``, ..., and the module steps its LR schedulers.

        Raises:
            PipelineConfigError: ``configure_optimizers`` returns an unknown form, several LR
                schedulers, or a setting that the trainer does not have.
        """
        optimizers, schedulers = self.configure()
        if self.is_manual:
            return {"optimizer": {f"optimizer_{i}": each for i, each in enumerate(optimizers)}}
        if len(optimizers) != 1 or len(schedulers) > 1:
            raise PipelineConfigError(
                f"{type(self.module).__name__}.configure_optimizers: expected one optimizer and at "
                f"most one LR scheduler, found {len(optimizers)} and {len(schedulers)}; step "
                "several optimizers with automatic_optimization=False, and combine LR schedulers "
                "by torch.optim.lr_scheduler.ChainedScheduler"
            )
        arguments: dict[str, Any] = {"optimizer": optimizers[0]}
        for found in schedulers:
            arguments["lr_scheduler"] = found.scheduler
            if isinstance(found.scheduler, ReduceLROnPlateau):
                is_full = str(found.monitor).startswith("eval/")
                prefix = "" if is_full or not self.overrides("validation_step") else "eval/val/"
                arguments["lr_scheduler_monitor"] = f"{prefix}{found.monitor}"
            else:
                is_step = found.interval == "step"
                arguments["lr_scheduler_every"] = "optimizer_step" if is_step else "epoch"
        return arguments

    def configure(self) -> tuple[list[Optimizer], list[Scheduler]]:
        """Return optimizers and LR schedulers; calls ``configure_optimizers`` once."""
        if self._configured is None:
            who = f"{type(self.module).__name__}.configure_optimizers"
            self._configured = parse_optimizers(self.module.configure_optimizers(), who)
        return self._configured

    def _train(self, batch: Any) -> Any:
        self._scope = "training_step"
        output = self._steps["training_step"](batch, self._bundle.run.progress.step_id)
        self._scope = ""
        return output

    def _forward_with_updates(self, model: Any, batch: Any, updates: Any) -> Any:
        """Return the result of a ``training_step`` that makes its updates itself."""
        self.updates = updates
        return self._train(batch)

    def forward(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """Return the result of ``training_step``, and its loss."""
        output = self._train(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            raise BatchProcessorError(
                f"{type(self.module).__name__}.training_step must return a loss, or a mapping with "
                f"'loss', got {output!r:.80}; to leave out a batch, call args.skip_batch(...) in a "
                "hook"
            )
        return output, loss

    def evaluation_forward(self, model: Any, batch: Any) -> tuple[Any, Any, Any]:
        """Return the result of ``validation_step``, the values that it logs, and their weight.

        Where a trainer looks for the names of values before the first step, this is Lightning's
        sanity check: an evaluation of one batch.
        """
        bundle = self._bundle
        if bundle.loader is None and bundle.is_running:
            with bundle.sanity_check() as values:
                output, found, weight = self.evaluate("validation_step", batch, 0)
            return output, {**found, **values}, weight
        if bundle.loader is None:
            self.refuse_hooks_of("validation")
        bundle.evaluated_batches += 1
        return self.evaluate("validation_step", batch, bundle.evaluated_batches - 1)

    def step_processor(self, step: str) -> SimpleBatchProcessor:
        """Return a batch processor for an ``Evaluator``, which calls another step of the module.

        ``Evaluator(module, adapter.step_processor("test_step"), {"test": loader}).evaluate()``
        returns the logged values; with ``"predict_step"``, ``predict()`` returns the outputs.
        ``batch_idx`` continues over several evaluations by one processor.

        Raises:
            PipelineConfigError: the module has no such step, or hooks around it, such as
                ``on_test_epoch_end``.
        """
        self.refuse_hooks_of(step.removesuffix("_step"))
        return _StepProcessor(self, step)

    def refuse_hooks_of(self, stage: str) -> None:
        """Refuse a step that the module lacks, and overridden hooks around a stage.

        Raises:
            PipelineConfigError: with the name of the hook.
        """
        who = type(self.module).__name__
        if f"{stage}_step" not in self._steps:
            raise PipelineConfigError(
                f"{who} has no {stage}_step, which this evaluation calls; define it"
            )
        for name in dir(self.module):
            is_around = name.startswith(f"on_{stage}_") and name not in self._left_out
            if is_around and is_overridden(self.module, name):
                raise PipelineConfigError(
                    f"{who}.{name} is called only by a ValidationHook of a training, for "
                    "validation_step; return values from the step, or pass metrics to the "
                    f"Evaluator; to go without it, pass leave_out=[{name!r}]"
                )

    def evaluate(self, step: str, batch: Any, index: int) -> tuple[Any, dict[str, Any], Any]:
        """Call a step and the hooks around the batch, as :meth:`evaluation_forward` does."""
        self._evaluated, self._sizes = {}, set()
        if self.overrides("on_after_batch_transfer"):
            batch = self.call("on_after_batch_transfer", batch, 0)
        if step == "validation_step":
            self.call("on_validation_batch_start", batch, index)
        self._scope = step
        output = self._steps[step](batch, index)
        self._scope = ""
        if step == "validation_step":
            self.call("on_validation_batch_end", output, batch, index)
        if len(self._sizes) > 1:
            raise PipelineConfigError(
                f"{type(self.module).__name__}.{step}: expected one batch_size for all values of a "
                f"batch, found {sorted(self._sizes)}; leave out batch_size"
            )
        return output, self._evaluated, next(iter(self._sizes), None)

    def call(self, hook: str, *arguments: Any, **named: Any) -> Any:
        """Call a hook of the module, if the module overrides it."""
        if hook not in self._own:
            return None
        outer, self._scope = self._scope, hook
        try:
            return getattr(self.module, hook)(*arguments, **named)
        finally:
            self._scope = outer

    def overrides(self, *hooks: str) -> bool:
        """Return True if the module overrides one of the hooks."""
        return not self._own.isdisjoint(hooks)

    # --- methods of the module ----------------------------------------------------------------

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or a list of several: ``self.optimizers()``."""
        found: list[Any] = self.configure()[0]
        if self.is_manual:
            found = [_ManualOptimizer(self, index, each) for index, each in enumerate(found)]
        return found[0] if len(found) == 1 else found

    def _manual_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Run a backward pass of all parameters: ``self.manual_backward(loss)``."""
        self.updates.backward(loss, **options)

    def _clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer: ``self.clip_gradients(...)``."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_val is None or gradient_clip_algorithm not in (None, "norm", "value"):
            raise PipelineConfigError(
                "self.clip_gradients: expected gradient_clip_val, and gradient_clip_algorithm "
                f"'norm' or 'value', found {gradient_clip_val} and {gradient_clip_algorithm!r}"
            )
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def _log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Publish a value: ``self.log(...)``.

        Values are always reduced over the ranks, as with ``sync_dist``. Sinks and the progress bar
        choose metrics by their own settings, not by ``logger`` and ``prog_bar``.
        """
        scope, bundle = self._scope, self._bundle
        defaults = HOOKS.get(scope)
        if defaults is None:
            raise PipelineStateError(
                f"self.log({name!r}) is not possible in {scope or 'this place'}; call it in a step "
                "or a hook of training or validation"
            )
        on_step = defaults[0] if on_step is None else on_step
        on_epoch = defaults[1] if on_epoch is None else on_epoch
        is_evaluated = "validation" in scope or scope == "test_step"
        is_metric = hasattr(value, "compute")
        text = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx.__name__
        reduce = _REDUCTIONS.get(text)
        problem = ""
        if not (on_step or on_epoch):
            problem = "expected on_step or on_epoch"
        elif is_evaluated and on_step:
            problem = "an evaluation has no values on a step; leave out on_step"
        elif reduce is None or (is_evaluated and reduce != "mean"):
            expected = "'mean'" if is_evaluated else ", ".join(map(repr, _REDUCTIONS))
            problem = f"expected reduce_fx {expected}, found {text!r}; log a torchmetrics object"
        elif is_metric and (on_step or not bundle.is_running):
            problem = (
                f"expected a number, found a {type(value).__name__}; log its value of the batch, "
                "self.metric(outputs, targets), or on_step=False, on_epoch=True in a training"
            )
        elif sync_dist_group is not None:
            problem = "values are reduced over all ranks; leave out sync_dist_group"
        if problem or reduce is None:
            raise PipelineConfigError(f"self.log({name!r}) in {scope}: {problem}")
        if rank_zero_only and not self._trainer.is_global_zero:
            return
        if is_metric:
            (bundle.metrics if is_evaluated else bundle.epoch_metrics)[name] = value
        elif scope in _EVALUATED_BATCH:
            self._evaluated[name] = value
            if batch_size is not None:
                self._sizes.add(batch_size)
        elif is_evaluated:
            bundle.values[name] = value
        else:
            both = on_step and on_epoch
            if on_step:
                full = f"{name}_step" if both else name
                bundle.publish(bundle.run.metrics, full, value, reduce, batch_size, defaults[0])
            if on_epoch:
                full = f"{name}_epoch" if both else name
                bundle.publish(bundle.of_epoch, full, value, reduce, batch_size, defaults[0])

    def _log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Publish values by name: ``self.log_dict(...)``."""
        # Of a MetricCollection: the metrics themselves, which share their states.
        options = {"copy_state": False} if hasattr(dictionary, "compute") else {}
        for name, value in dictionary.items(**options):
            self._log(name, value, *args, **kwargs)


def _remove_adapter(module: torch.nn.Module) -> None:
    """Remove the methods that an earlier adapter gave to a module."""
    for part in module.modules():
        for name, method in list(vars(part).items()):
            if isinstance(getattr(method, "__self__", None), LightningModuleProcessor):
                delattr(part, name)


class _StepProcessor(SimpleBatchProcessor):
    """Batch processor that evaluates a LightningModule by another step."""

    def __init__(self, adapter: LightningModuleProcessor, step: str) -> None:
        super().__init__(need_backward=False)
        self._adapter, self._step, self._count = adapter, step, 0

    def forward(self, model: Any, batch: Any) -> tuple[Any, Any]:
        raise BatchProcessorError(f"{self._step} of a LightningModule is for an Evaluator")

    def evaluation_forward(self, model: Any, batch: Any) -> tuple[Any, Any, Any]:
        self._count += 1
        return self._adapter.evaluate(self._step, batch, self._count - 1)


class _ManualOptimizer:
    """Optimizer of a module that makes its updates itself; only ``step`` differs from torch's.

    A step runs the hooks of ``on_optimizer_step``, and keeps the gradients unless a hook skips it.
    """

    def __init__(self, adapter: LightningModuleProcessor, index: int, optimizer: Optimizer) -> None:
        self._adapter = adapter
        self._name = f"optimizer_{index}"
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Compute gradients of this optimizer's parameters only."""
        module = self._adapter.module
        module.toggle_optimizer(self)
        try:
            yield
        finally:
            module.untoggle_optimizer(self)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Make an update; ``closure`` computes the gradients before."""
        if closure is not None:
            closure()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        if self._adapter.updates.make_update(self._name):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # zero_grad() is the module's to call
