"""Hook that evaluates the model during training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from torch.optim import Optimizer

from robo_orchard_core.utils.config import ConfigFieldError, Function, Part, function_of
from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.data.evaluation_loader import check_dataloaders, check_max_batches
from robo_orchard_lab.pipeline.data.loader import is_map_style
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics.torchmetrics import MetricInputs, MetricsLike, TorchMetrics
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema
from robo_orchard_lab.pipeline.trigger import Last, TriggerField

STATE_VERSION = 1

LoaderPart: TypeAlias = Annotated[Any, Part("collections.abc:Iterable")]
"""Config of a loader or another iterable."""
MetricPart: TypeAlias = Annotated[
    Any, Part(("torchmetrics.metric:Metric", "torchmetrics.collections:MetricCollection"))
]
"""Config of a torchmetrics metric."""


class ValidationHook(PipelineHooks):
    """Evaluation of the run's model on a trigger or on request.

    Training is not affected by an evaluation; see :class:`Evaluator`, also for several ranks.
    Other hooks request an evaluation by ``args.requests.evaluate(reason)``. A step is evaluated at
    most once.

    Several weights are evaluated on the same data under names of one's choice:
    ``weights={"raw": None, "ema": "EMA"}``.

    - Ranks: all.
    - Publishes: ``eval/<loader>/loss`` or the processor's named values, and
      ``eval/<loader>/<metric>``, with the next logging point; at once if a hook subscribes to one
      of these metrics. With named weights, ``eval/<loader>/<weights>/...``.
    - Requests: evaluations.
    - State: the step of the last evaluation.
    - Cost: before the first step, the first batches of each loader, one for each rank, if only the
      batch processor's results show the names: with an ``evaluation_forward``, without a backward
      pass, or with several optimizers.

    >>> hook = ValidationHookConfig(every="100 steps | 1 epoch")(dataloaders={"val": [1, 2, 3]})
    >>> hook.name
    'ValidationHook'

    Args:
        cfg: trigger and weights; optionally loaders and metrics.
        dataloaders: by name; here or in the config.
        metrics: of torchmetrics, by name, or a collection; here or in the config.
        metric_inputs: ``metric_inputs(outputs, batch)`` returns the arguments of ``metric.update``;
            here or in the config; by default the batch processor's method of this name.

    Raises:
        PipelineConfigError: no loaders, an unknown name in ``sets`` or ``max_batches``, or an
            argument given both here and in the config; and errors of :class:`Evaluator`. Before
            the first step: unknown weights, or nothing to measure.
    """

    keeps_trajectory = True
    reads = ("model.weights", "model.buffers")
    changes = ("metrics",)
    requests = ()

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
        if cfg.every is not None or cfg.at_start or cfg.at_end:
            self.declare_effects(requests=["evaluate"])
        who = self.name
        given: Any = given_or_built(dataloaders, cfg.dataloaders, "dataloaders", who)
        loaders = check_dataloaders({} if given is None else given, who)
        self._dataloaders = loaders if cfg.sets is None else _select(loaders, cfg.sets, who)
        self._metrics = TorchMetrics(given_or_built(metrics, cfg.metrics, "metrics", who), who)
        self._metric_inputs: MetricInputs | None = given_or_built(
            metric_inputs, cfg.metric_inputs, "metric_inputs", who
        )
        limits = check_max_batches(cfg.max_batches, loaders, who).items()
        self._max_batches = {n: m for n, m in limits if m is not None and n in self._dataloaders}
        named = cfg.weights if isinstance(cfg.weights, Mapping) else {"": cfg.weights}
        self._weights: dict[str, str | None] = dict(named)
        self._values: dict[str, list[str]] | None = None  # names by loader, once known
        self._evaluated_at: int | None = None  # completed steps at the last evaluation
        self.register_hook("on_loop", HookContext.from_callable(self._open, self._close))
        self.on_epoch.before(self._check_weights)
        if cfg.every is not None:
            self.register_at_commit(partial(self._request, f"every {cfg.every}"), cfg.every)
        if cfg.at_end:
            self.register_at_commit(partial(self._request, "at the end"), Last())

    @property
    def published_metrics(self) -> Sequence[str]:  # type: ignore[override]  # read-only here
        names = ["loss", *self._metrics.names()]
        values = self._values or dict.fromkeys(self._dataloaders, names)
        return [
            f"eval/{place}/{name}"
            for loader, found in values.items()
            for place in self._places(loader)
            for name in found
        ]

    def _places(self, loader: str) -> list[str]:
        """Return a loader's part of names, for each of the weights."""
        return [f"{loader}/{label}" if label else loader for label in self._weights]

    def _open(self, args: PipelineHookArgs) -> None:
        evaluator = Evaluator(
            args.model,
            args.batch_processor,
            self._dataloaders,
            metrics=self._metrics,
            metric_inputs=self._metric_inputs,
            accelerator=args.accelerator,
            max_batches=self._max_batches,
            seed=self.cfg.seed,
            who=args.run.locate(self.name),
        )
        for loader in self._dataloaders:
            for place in self._places(loader):
                other = args.run.evaluated_loaders.setdefault(place, self.name)
                if other != self.name:
                    raise PipelineConfigError(
                        f"{self.name}: dataloaders[{loader!r}] and a loader of {other} would both "
                        f"publish eval/{place}/...; rename one of the loaders, or name the weights "
                        "of both hooks, such as weights={'ema': 'EMA'}"
                    )
        args.run.evaluations[self.name] = partial(self._evaluate, evaluator)
        if not (evaluator.knows_value_names and isinstance(args.run.optimizer, Optimizer)):
            args.run.start_checks.append(partial(self._find_values, evaluator))
        if self.cfg.at_start and args.global_step_id == 0:
            self._request("at the start", args)

    def _close(self, args: PipelineHookArgs) -> None:
        args.run.evaluations.pop(self.name, None)
        for loader in self._dataloaders:
            for place in self._places(loader):
                if args.run.evaluated_loaders.get(place) == self.name:
                    del args.run.evaluated_loaders[place]

    def _find_values(self, evaluator: Evaluator) -> None:
        """Evaluate the first batches to learn the names of values."""
        self._values = evaluator.find_value_names()

    def _check_weights(self, args: PipelineHookArgs) -> None:
        """Refuse unknown weights before the first step."""
        for label, weights in self._weights.items():
            if weights is not None and weights not in args.run.weight_sets:
                place = args.run.locate(self.name, "weights", *filter(None, [label]))
                try:
                    args.run.weight_set(weights)
                except PipelineConfigError as error:
                    raise PipelineConfigError(f"{place}: {error}") from None

    def _request(self, reason: str, args: PipelineHookArgs) -> None:
        if args.exception is None and args.progress.steps_done != self._evaluated_at:
            args.requests.evaluate(reason, by=self.name, name=self.name)

    def _evaluate(self, evaluator: Evaluator, args: PipelineHookArgs) -> None:
        step = args.progress.steps_done
        if step == self._evaluated_at:
            return
        self._check_weights(args)  # an evaluation at the start precedes the first epoch
        for label, weights in self._weights.items():
            with args.run.applied(weights):
                found = evaluator.run(prefix="eval/", label=label)
            args.metrics.defer(found)
        self._evaluated_at = step

    def rank_consistency_info(self) -> dict[str, dict[str, str]]:
        """Return a description of each loader, to be equal on all ranks."""
        return {"dataloaders": {n: _describe(loader) for n, loader in self._dataloaders.items()}}

    state_schema = StateSchema(STATE_VERSION, evaluated_at=Count | None)

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "evaluated_at": self._evaluated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._evaluated_at = state["evaluated_at"]


class ValidationHookConfig(PipelineHooksConfig[ValidationHook]):
    """Trigger, weights, loaders and metrics of evaluations.

    >>> print(ValidationHookConfig(every="500 steps", at_start=True).every)
    500 steps
    """

    class_type: type[ValidationHook] = ValidationHook
    every: TriggerField | None = Field(
        default="1 epoch",
        description="Trigger, such as '500 steps | 1 epoch'; None evaluates only on requests "
        "of hooks.",
    )
    at_start: bool = Field(
        default=False, description="Evaluate before the first step, but not when resuming."
    )
    at_end: bool = Field(
        default=False,
        description="Evaluate when the run reaches one of its limits, but not when a hook stops "
        "the run.",
    )
    weights: str | dict[str, str | None] | None = Field(
        default=None,
        description="Name of the hook whose weights to evaluate, such as 'EMA'; None for the "
        "model's own. Or several by names of your choice: {raw: null, ema: EMA}.",
    )
    max_batches: int | dict[str, int] | None = Field(
        default=None,
        description="Evaluate only the first batches of each loader, the same at any world size; "
        "or limits by the names of loaders.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of each evaluation.")
    dataloaders: dict[str, LoaderPart] | None = Field(
        default=None, description="Loaders by name, unless passed to the hook."
    )
    sets: list[str] | None = Field(
        default=None, min_length=1, description="Names of the loaders to evaluate on; None for all."
    )
    metrics: dict[str, MetricPart] | None = Field(
        default=None, description="Metrics by name, unless passed to the hook."
    )
    metric_inputs: Function | None = Field(
        default=None,
        description="metric_inputs(outputs, batch) returns the arguments of metric.update, "
        "unless passed to the hook; None for the batch processor's method.",
    )

    def __post_init__(self) -> None:
        labels = self.weights if isinstance(self.weights, Mapping) else ["own"]
        if not labels or any(not label or "/" in label for label in labels):
            raise ConfigFieldError(
                "expected names without '/', such as {'raw': None, 'ema': 'EMA'}, found "
                f"{self.weights!r}; rename them",
                ("weights",),
            )
        limits = self.max_batches
        for limit in limits.values() if isinstance(limits, Mapping) else [limits]:
            if limit is not None and limit < 1:
                problem = f"expected a number of batches >= 1, found {limit}; leave it out for all"
                raise ConfigFieldError(problem, ("max_batches",))


def _select(
    loaders: Mapping[str, Iterable[Any]], names: Sequence[str], who: str
) -> dict[str, Iterable[Any]]:
    for index, name in enumerate(names):
        if name not in loaders:
            advice = suggest_name(name, [*loaders], "expected one of")
            raise PipelineConfigError(
                f"{who}.sets: there is no loader {name!r}; {advice}", setting=("sets", index)
            )
    return {name: loaders[name] for name in names}


def _describe(loader: Any) -> str:
    loader = getattr(loader, "base_dataloader", loader)
    if not is_map_style(loader):
        return "a stream"
    return f"{count_batches(loader.dataset)} samples in batches of {loader.batch_size}"


def given_or_built(given: Any, configured: Any, field: str, who: str) -> Any:
    """Return an argument of a hook, or build the function or parts of its config; None for neither.

    Raises:
        PipelineConfigError: both are given.
    """
    if given is not None and configured is not None:
        raise PipelineConfigError(
            f"{who}: {field} is given to the hook and in its config; remove one of the two"
        )
    if configured is None:
        return given
    if isinstance(configured, Mapping):
        return {name: part() for name, part in configured.items()}
    return function_of(configured)
