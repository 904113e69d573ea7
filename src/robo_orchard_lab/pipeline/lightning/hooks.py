"""Hooks that call those of a LightningModule, and the module's ``self.trainer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import join_by_rank
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    PipelineStateError,
    StateError,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.metrics.accumulators import Reduction
from robo_orchard_lab.pipeline.metrics.torchmetrics import TorchMetrics
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.state_schema import StateSchema, check_similar


class LightningModuleHooks(PipelineHooks):
    """Hooks that call those of a LightningModule, and collect what the module logs.

    - Publishes: the names of ``self.log``, and ``eval/<loader>/<name>``.
    - State: values that the module logged for the current epoch, its objects of torchmetrics, and
      LR schedulers that it steps.

    Args:
        adapter: a ``LightningModuleProcessor``.
        of_trainer: given values of ``self.trainer``.
    """

    # Any name but eval/..., which the evaluation itself declares.
    published_metrics = ("[!e]*", "e[!v]*", "ev[!a]*", "eva[!l]*", "eval[!/]*", "e", "ev", "eva")

    def __init__(self, adapter: Any, of_trainer: Mapping[str, Any]) -> None:
        super().__init__()
        self._adapter = adapter
        self._of_trainer = of_trainer
        self._run: PipelineRun | None = None
        self.args: Any = None
        """Arguments of the current step."""
        self.epoch: int = 0
        """Current epoch, also in the evaluation after it."""
        self.of_epoch = MetricsBoard()
        """Values of ``self.log(on_epoch=True)`` since the start of the epoch."""
        self.loader: str | None = None
        """Loader of the current evaluation, or None."""
        self.is_sanity_check = False
        self.evaluated_batches = 0
        """Number of batches of the current evaluation."""
        self.metrics: dict[str, Any] = {}
        """Objects of torchmetrics that the module logged in the current evaluation, by name."""
        self.epoch_metrics: dict[str, Any] = {}
        """Objects of torchmetrics that the module logged in the current epoch, by name."""
        self._all_metrics = TorchMetrics.of_module(adapter.module)
        self.values: dict[str, Any] = {}
        """Values that the module logged for the current evaluation, by name."""
        call, overrides = adapter.call, adapter.overrides
        self._call = call
        self._changes_batch = overrides("on_after_batch_transfer", "on_train_batch_start")
        self.on_loop.before(self._check_model)
        self.register_hook("on_loop", HookContext.from_callable(self._begin_loop, self._end_loop))
        epoch = HookContext.from_callable(self._begin_epoch, self._end_epoch)
        self.register_hook("on_epoch", epoch)
        self.on_step.before(self._begin_step)
        if overrides("on_before_backward"):
            self.on_model_backward.before(
                lambda args: call("on_before_backward", args.attached_loss)
            )
        if overrides("on_after_backward"):
            self.on_model_backward.after(
                lambda args: None if args.exception else call("on_after_backward")
            )
        if overrides("on_before_optimizer_step"):
            self.on_optimizer_step.before(
                lambda args: call("on_before_optimizer_step", args.optimizer)
            )
        if overrides("on_train_batch_end"):  # after the update, where there is one
            if not adapter.is_manual:
                self.on_optimizer_step.after(self._end_batch)
            self.on_step.after(self._end_step)
        evaluation = HookContext.from_callable(self._begin_evaluation, self._end_evaluation)
        self.register_hook("on_evaluation", evaluation)

    @property
    def run(self) -> PipelineRun:
        """Run in progress."""
        if self._run is None:
            raise PipelineStateError(
                f"{type(self._adapter.module).__name__} logs, or reads its trainer, outside of a "
                "run; pass adapter.hooks() to the trainer, or values that configure_optimizers "
                "reads to LightningModuleProcessor, as by trainer={'max_epochs': 3}"
            )
        return self._run

    @property
    def is_running(self) -> bool:
        """Return True during a run."""
        return self._run is not None

    def publish(
        self,
        board: MetricsBoard,
        name: str,
        value: Any,
        reduce: Reduction,
        size: int | None,
        in_step: bool,
    ) -> None:
        """Publish a value; a mean is weighted by the samples of the step's batch."""
        if in_step and self.args.is_padding_step:
            if reduce == "mean":
                board.publish(name, 0.0, reduce, 0.0)
        elif in_step and reduce == "mean":
            board.publish(name, value, reduce, self.args.batch_size if size is None else size)
        else:
            board.publish(name, value, reduce)

    # --- training -----------------------------------------------------------------------------

    def _begin_loop(self, args: PipelineHookArgs) -> None:
        self._run, self.epoch = args.run, args.epoch_id
        if self._adapter.overrides("validation_step"):
            args.run.start_checks.insert(0, partial(_check_loaders, args.run))
        self._call("on_fit_start")
        self._call("on_train_start")

    def _check_model(self, args: PipelineHookArgs) -> None:
        """Refuse another batch processor or model than the adapter's, and a compiled model."""
        processor, module = cast(Any, args.batch_processor), self._adapter.module
        if processor is not self._adapter:
            raise PipelineConfigError(
                f"{self.name}: expected their LightningModuleProcessor as the trainer's batch "
                f"processor, found another {type(processor).__name__}"
            )
        model = args.accelerator.unwrap_model(args.model, keep_torch_compile=True)
        if model is not module:
            raise PipelineConfigError(
                f"{self.name}: expected the adapter's own {type(module).__name__} as the trainer's "
                f"model, found another {type(model).__name__}; pass the module, and compile its "
                "parts, as by self.net = torch.compile(self.net)"
            )

        for name in self._of_trainer.keys() & _OF_RUN.keys():
            given, found = self._of_trainer[name], _OF_RUN[name](args.run)
            if given != found:
                raise PipelineConfigError(
                    f"trainer={{{name!r}: {given!r}}} of LightningModuleProcessor: the run has "
                    f"{found!r}; make them equal"
                )

    def _end_loop(self, args: PipelineHookArgs) -> None:
        # A rollback enters the loop again.
        if args.exception is None and args.requests.rollback_request is None:
            self.epoch = args.epoch_id
            self._call("on_train_end")
            self._call("on_fit_end")
            self._call("teardown", stage="fit")
        self._run = self.args = None

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        self.epoch = args.epoch_id
        if args.step_id == 0:  # not in a run that resumes within the epoch
            self._call("on_train_epoch_start")

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None:
            self._call("on_train_epoch_end")
            args.metrics.publish_all(self.of_epoch)
            for name, value in _compute(self.epoch_metrics).items():
                args.metrics.publish(name, value)

    def _begin_step(self, args: PipelineHookArgs) -> None:
        self.args = args
        if not self._changes_batch:
            return
        if self._adapter.overrides("on_after_batch_transfer"):
            args.batch = self._call("on_after_batch_transfer", args.batch, 0)
        if self._call("on_train_batch_start", args.batch, args.step_id) == -1:
            raise PipelineStateError(
                "on_train_batch_start returned -1, which ends the epoch in Lightning; set "
                "self.trainer.should_stop = True to end the run, or use a shorter loader"
            )

    def _end_step(self, args: PipelineHookArgs) -> None:
        if self._adapter.is_manual or not args.at_accumulation_boundary:
            self._end_batch(args)

    def _end_batch(self, args: PipelineHookArgs) -> None:
        if args.exception is None:
            outputs = args.model_outputs if isinstance(args.model_outputs, Mapping) else {}
            if not self._adapter.is_manual and args.loss is not None:
                outputs = {**outputs, "loss": args.loss / args.loss_divisor}
            self._call("on_train_batch_end", outputs, args.batch, args.step_id)

    # --- evaluation ---------------------------------------------------------------------------

    @contextmanager
    def sanity_check(self) -> Iterator[dict[str, float]]:
        """Surround one batch as an evaluation; the mapping has the values of the end afterwards."""
        values: dict[str, float] = {}
        self.is_sanity_check = True
        self._begin_values()
        try:
            yield values
            values |= self._end_values()
        finally:
            self.is_sanity_check = False

    def _begin_evaluation(self, args: PipelineHookArgs) -> None:
        if not self._adapter.overrides("validation_step"):
            return
        (self.loader,) = _loaders_of(args.run, args.evaluation)
        self.evaluated_batches = 0
        with args.evaluating():
            self._begin_values()

    def _end_evaluation(self, args: PipelineHookArgs) -> None:
        if args.exception is None and self.loader is not None:
            with args.evaluating():
                values = self._end_values()
            for name, value in values.items():
                args.metrics.publish(f"eval/{self.loader}/{name}", value)
        self.loader = None

    def _begin_values(self) -> None:
        self.metrics, self.values = {}, {}
        self._call("on_validation_start")
        self._call("on_validation_epoch_start")

    def _end_values(self) -> dict[str, Any]:
        """Return the values of the complete evaluation; collectives of torchmetrics."""
        self._call("on_validation_epoch_end")
        self._call("on_validation_end")
        return self.values | _compute(self.metrics)

    # --- state --------------------------------------------------------------------------------

    state_schema = StateSchema(
        values=dict[str, Any], metrics=dict[str, Any], lr_schedulers=list[dict[str, Any]]
    )

    def state_dict(self) -> dict[str, Any]:
        schedulers = [each.state_dict() for each in self._own_lr_schedulers()]
        return {
            "values": self.of_epoch.state_dict(),
            "metrics": self._all_metrics.state_dict(),
            "lr_schedulers": schedulers,
        }

    def check_state(self, state: Any, model: torch.nn.Module) -> None:
        super().check_state(state, model)
        MetricsBoard.check(state["values"])
        self._all_metrics.check(state["metrics"])
        live = [each.state_dict() for each in self._own_lr_schedulers()]
        if len(live) != len(state["lr_schedulers"]):
            raise StateError(
                f"{self.name}: expected {len(live)} LR schedulers of the module, found "
                f"{len(state['lr_schedulers'])} in the checkpoint"
            )
        check_similar(live, state["lr_schedulers"], f"{self.name}.lr_schedulers", strict=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = next(self._adapter.module.parameters()).device
        self.of_epoch.load_state_dict(state["values"], device)
        self._all_metrics.to(device)
        self._all_metrics.load_state_dict(state["metrics"])
        for own, saved in zip(self._own_lr_schedulers(), state["lr_schedulers"], strict=True):
            own.load_state_dict(dict(saved))

    def _own_lr_schedulers(self) -> list[Any]:
        """Return the LR schedulers that the module steps itself, which the trainer lacks."""
        found = self._adapter.configure()[1] if self._adapter.is_manual else []
        return [each.scheduler for each in found]

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], world_size: int
    ) -> Sequence[Mapping[str, Any]]:
        """Merge the values of all ranks."""
        values = MetricsBoard.redistribute_states([s["values"] for s in states], world_size)
        merged = join_by_rank(
            [state["metrics"] for state in states], world_size, self._all_metrics.merge_state_dicts
        )
        return [
            {**states[0], "values": own, "metrics": metrics}
            for own, metrics in zip(values, merged, strict=True)
        ]


def _loaders_of(run: PipelineRun, hook: str | None) -> list[str]:
    """Return the names of the loaders that a hook evaluates, with those of its weights."""
    return [name for name, owner in run.evaluated_loaders.items() if owner == hook]


def _check_loaders(run: PipelineRun) -> None:
    """Refuse an evaluation of several loaders, whose batches a module can't tell apart."""
    for hook in dict.fromkeys(run.evaluated_loaders.values()):
        if len(loaders := _loaders_of(run, hook)) != 1:
            raise PipelineConfigError(
                f"{run.locate(hook, 'dataloaders')}: expected one loader with one set of weights "
                f"for a LightningModule, found {', '.join(loaders)}; add a ValidationHook for "
                "each: hooks={'val': ..., 'other': ...}"
            )


def _compute(metrics: dict[str, Any]) -> dict[str, Any]:
    """Compute, reset and forget objects of torchmetrics; collectives of several ranks."""
    values = {name: metric.compute() for name, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()
    metrics.clear()
    return values


_CONSTANTS: dict[str, Any] = {
    "logger": None,  # as with Trainer(logger=False)
    "loggers": [],
    "progress_bar_callback": None,
    "fast_dev_run": False,
    "testing": False,
    "predicting": False,
}
_OF_RUN: dict[str, Callable[[PipelineRun], Any]] = {
    "global_step": lambda run: (
        sum(run.progress.optimizer_steps.values()) or run.progress.optimizer_step_id
    ),
    "max_epochs": lambda run: run.limits.max_epoch,
    "max_steps": lambda run: run.limits.max_optimizer_step or -1,
    "num_training_batches": lambda run: run.steps_per_epoch or math.inf,
    "is_last_batch": lambda run: run.progress.step_id + 1 == run.steps_per_epoch,
    "accumulate_grad_batches": lambda run: run.accelerator.gradient_accumulation_steps,
    "world_size": lambda run: run.accelerator.num_processes,
    "global_rank": lambda run: run.accelerator.process_index,
    "local_rank": lambda run: run.accelerator.local_process_index,
    "is_global_zero": lambda run: run.accelerator.is_main_process,
    "should_stop": lambda run: run.requests.stop_request is not None,
}
_OF_HOOKS: dict[str, Callable[[LightningModuleHooks], Any]] = {
    "current_epoch": lambda hooks: hooks.epoch,
    "sanity_checking": lambda hooks: hooks.is_sanity_check,
    "training": lambda hooks: hooks.loader is None and not hooks.is_sanity_check,
    "validating": lambda hooks: hooks.loader is not None,
}
_OF_ADAPTER: dict[str, Callable[[Any], Any]] = {
    "lightning_module": lambda adapter: adapter.module,
    "optimizers": lambda adapter: adapter.configure()[0],
    "lr_scheduler_configs": lambda adapter: adapter.configure()[1],
}


class TrainerOfModule:
    """Counters and objects of the run: ``self.trainer`` of a LightningModule.

    Values that are given take the place of others outside of a run. Any other attribute of
    Lightning's Trainer is a ``PipelineStateError``.
    """

    _adapter: Any
    _hooks: LightningModuleHooks
    _given: Mapping[str, Any]

    def __init__(self, adapter: Any, hooks: LightningModuleHooks, given: Mapping[str, Any]) -> None:
        vars(self).update(_adapter=adapter, _hooks=hooks, _given=given)  # not by __setattr__

    def __deepcopy__(self, memo: Any) -> TrainerOfModule:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _OF_RUN and (self._hooks.is_running or name not in self._given):
            return _OF_RUN[name](self._hooks.run)
        if name in self._given:
            return self._given[name]
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _OF_HOOKS:
            return _OF_HOOKS[name](self._hooks)
        if name in _OF_ADAPTER:
            return _OF_ADAPTER[name](self._adapter)
        raise PipelineStateError(
            f"{type(self._adapter.module).__name__} reads self.trainer.{name}, which "
            f"LightningModuleProcessor does not know; pass trainer={{{name!r}: ...}} to it, or "
            "move the code to a hook"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "should_stop":
            raise PipelineStateError(f"self.trainer.{name} can't be set; use a hook")
        if value:
            by = type(self._adapter.module).__name__
            self._hooks.run.requests.stop("self.trainer.should_stop was set", by=by)
