"""Evaluate the model while it is trained."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from robo_orchard_core.utils.config import ClassConfig, Function, Part, function_of
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.data.loader import is_map_style
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.evaluation_loader import check_dataloaders
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics.torchmetrics import MetricInputs, MetricsLike, TorchMetrics
from robo_orchard_lab.pipeline.trigger import Last, TriggerField

STATE_VERSION = 1

LoaderPart: TypeAlias = Annotated[Any, Part("collections.abc:Iterable")]
"""A loader, or anything else that can be iterated, as a configuration builds it."""
MetricPart: TypeAlias = Annotated[
    Any, Part(("torchmetrics.metric:Metric", "torchmetrics.collections:MetricCollection"))
]
"""A metric of torchmetrics, as a configuration builds it."""


class ValidationHook(PipelineHooks):
    """Evaluates the run's model with its batch processor, on a schedule or when it is asked to.

    It publishes ``eval/<loader>/loss`` and ``eval/<loader>/<metric>``, all of them with the next
    logging point, or at once where someone waits for one. Training goes on as if there had been
    no evaluation: see :class:`Evaluator`, also for what is done on several ranks. Any hook asks
    for one by ``args.requests.evaluate(reason)``; at one step, it is made once.

    >>> hook = ValidationHookConfig(every="100 steps | 1 epoch")(dataloaders={"val": [1, 2, 3]})
    >>> hook.name
    'ValidationHook'

    Args:
        cfg: when to evaluate, and what with.
        dataloaders: by name; here or in the configuration.
        metrics: of torchmetrics, by name, or a collection; here or in the configuration.
        metric_inputs: ``metric_inputs(outputs, batch)`` gives the arguments of ``metric.update``;
            by default the batch processor's method of that name; here or in the configuration.

    Raises:
        PipelineConfigError: no loaders, something both here and in the configuration, or a set
            that isn't among the loaders; and what an :class:`Evaluator` raises.
    """

    keeps_trajectory = True

    def __init__(
        self,
        cfg: ValidationHookConfig,
        *,
        dataloaders: Mapping[str, Iterable[Any]] | None = None,
        metrics: MetricsLike | None = None,
        metric_inputs: MetricInputs | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        who = self.name
        given: Any = given_or_built(dataloaders, cfg.dataloaders, "dataloaders", who)
        loaders = check_dataloaders({} if given is None else given, who)
        self._dataloaders = loaders if cfg.sets is None else _picked(loaders, cfg.sets, who)
        self._metrics = TorchMetrics(given_or_built(metrics, cfg.metrics, "metrics", who), who)
        self._metric_inputs: MetricInputs | None = function_given(
            metric_inputs, cfg.metric_inputs, "metric_inputs", who
        )
        self._evaluator: Evaluator | None = None
        self._evaluated_at: int | None = None
        """How many steps were done at the last evaluation."""
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._open, after=self._close)
        )
        if cfg.weights is not None:
            self.register_hook("on_epoch", HookContext.from_callable(before=self._check_weights))
        if cfg.every is not None:
            self.register_at_commit(self._ask_by_schedule, cfg.every)
        if cfg.at_end:
            self.register_at_commit(self._ask_at_end, Last())

    def _open(self, args: PipelineHookArgs) -> None:
        self._evaluator = Evaluator(
            args.model,
            args.batch_processor,
            self._dataloaders,
            metrics=self._metrics,
            metric_inputs=self._metric_inputs,
            accelerator=args.accelerator,
            seed=self.cfg.seed,
            who=self.name,
        )
        for loader in self._dataloaders:
            other = args.run.evaluated_loaders.setdefault(loader, self.name)
            if other != self.name:
                raise PipelineConfigError(
                    f"{self.name}: dataloaders[{loader!r}] has a name that {other} has as well, so "
                    f"that both would publish eval/{loader}/...; name one of them otherwise"
                )
        args.run.evaluations[self.name] = self._evaluate
        if self.cfg.at_start and args.global_step_id == 0:
            self._ask(args, "at the start")

    def _close(self, args: PipelineHookArgs) -> None:
        args.run.evaluations.pop(self.name, None)
        for loader in self._dataloaders:
            if args.run.evaluated_loaders.get(loader) == self.name:
                del args.run.evaluated_loaders[loader]
        self._evaluator = None

    def _check_weights(self, args: PipelineHookArgs) -> None:
        """Every hook has opened by now, so that a wrong name is told before the first step."""
        if self.cfg.weights is not None:
            args.run.weight_set(self.cfg.weights)

    def _ask_by_schedule(self, args: PipelineHookArgs) -> None:
        self._ask(args, f"every {self.cfg.every}")

    def _ask_at_end(self, args: PipelineHookArgs) -> None:
        self._ask(args, "at the end")

    def _ask(self, args: PipelineHookArgs, reason: str) -> None:
        if args.exception is None and args.progress.steps_done != self._evaluated_at:
            args.requests.evaluate(reason, by=self.name, name=self.name)

    def _evaluate(self, args: PipelineHookArgs) -> None:
        step = args.progress.steps_done
        if self._evaluator is None or step == self._evaluated_at:
            return
        weights = self.cfg.weights
        with args.run.weight_set(weights).applied() if weights is not None else nullcontext():
            args.metrics.defer(self._evaluator.run(prefix="eval/"))
        self._evaluated_at = step

    def rank_consistency_info(self) -> dict[str, dict[str, str]]:
        """The loaders on which the ranks evaluate together, with their samples where they have an
        index."""
        return {"dataloaders": {name: _size(each) for name, each in self._dataloaders.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "evaluated_at": self._evaluated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._evaluated_at = state["evaluated_at"]


class ValidationHookConfig(PipelineHooksConfig[ValidationHook]):
    """When to evaluate, and with which weights.

    >>> print(ValidationHookConfig(every="500 steps", at_start=True).every)
    500 steps
    """

    class_type: type[ValidationHook] = ValidationHook
    every: TriggerField | None = Field(
        default="1 epoch",
        description="The schedule of evaluations, such as '500 steps | 1 epoch'; None for those "
        "that are asked for alone.",
    )
    at_start: bool = Field(
        default=False, description="Evaluate ahead of the first step of the run; not on resuming."
    )
    at_end: bool = Field(
        default=False,
        description="Evaluate when the run reaches one of its limits, where it is not due anyway; "
        "not when a hook stops it.",
    )
    weights: str | None = Field(
        default=None,
        description="The name of the hook whose weights to evaluate, such as 'EMA'; None for the "
        "model's own.",
    )
    seed: int = Field(
        default=0, ge=0, description="Of what is random in an evaluation, each time the same."
    )
    dataloaders: dict[str, LoaderPart] | None = Field(
        default=None,
        description="What builds the loaders, by name, where they aren't given to the hook.",
    )
    sets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which of the loaders to evaluate on, by their names; None for all of them.",
    )
    metrics: dict[str, MetricPart] | None = Field(
        default=None,
        description="What builds the metrics, by name, where they aren't given to the hook.",
    )
    metric_inputs: Function | None = Field(
        default=None,
        description="metric_inputs(outputs, batch) gives the arguments of metric.update, where "
        "it isn't given to the hook; None: as the batch processor says.",
    )


def _picked(
    loaders: Mapping[str, Iterable[Any]], names: Iterable[str], who: str
) -> dict[str, Iterable[Any]]:
    for name in names:
        if name not in loaders:
            near = difflib.get_close_matches(name, loaders, n=1)
            raise PipelineConfigError(
                f"{who}: sets names {name!r}, which is none of the loaders"
                + (f"; did you mean {near[0]!r}?" if near else f": {', '.join(loaders)}")
            )
    return {name: loaders[name] for name in names}


def _size(loader: Any) -> str:
    loader = getattr(loader, "base_dataloader", loader)
    if not is_map_style(loader):
        return "a stream"
    return f"{count_batches(loader.dataset)} samples in batches of {loader.batch_size}"


def given_or_built(
    given: Any, configs: Mapping[str, ClassConfig[Any]] | None, field: str, who: str
) -> Any:
    """What a hook was given as an argument, or what its configuration builds; None for neither.

    Raises:
        PipelineConfigError: it was given both.
    """
    if given is not None and configs is not None:
        raise PipelineConfigError(
            f"{who}: {field} are given to the hook and in its configuration; give them once"
        )
    if configs is None:
        return given
    return {name: config() for name, config in configs.items()}


def function_given(given: Any, configured: Any, field: str, who: str) -> Any:
    """The function that a hook was given as an argument, or by its configuration, or None.

    Raises:
        PipelineConfigError: it was given both.
    """
    if given is not None and configured is not None:
        raise PipelineConfigError(
            f"{who}: {field} is given to the hook and in its configuration; give it once"
        )
    return given if configured is None else function_of(configured)
