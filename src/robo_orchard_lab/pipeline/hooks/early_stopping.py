"""Stop when a metric gets no better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.best_value import BestValue, Mode
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.requests import Requests

STATE_VERSION = 1


class EarlyStopping(PipelineHooks):
    """Asks the trainer to stop when a metric has got no better for a number of evaluations.

    An evaluation is a value of the metric, whenever one is known: of ``eval/...`` after each
    evaluation, of others at each logging point. NaN is one that is not better. A run that was
    stopped this way and is resumed stops at once, unless ``patience`` was raised.

    It runs on every rank, on values that all ranks have; it costs a step nothing.

    >>> from robo_orchard_lab.pipeline.context import PipelineRun
    >>> run = PipelineRun()
    >>> stopping = EarlyStoppingConfig(monitor="eval/val/loss", mode="min", patience=2)()
    >>> with stopping.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (0.5, 0.7, 0.5):
    ...         run.metrics.publish("eval/val/loss", loss)
    ...         record = run.metrics.flush(log=True)
    >>> run.requests.stop_request.reason
    'eval/val/loss has got no better than 0.5000 (step 0) in 2 evaluations'
    """

    keeps_trajectory = True

    def __init__(self, cfg: EarlyStoppingConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._best = BestValue(cfg.mode, cfg.min_delta)
        self._latest: float | None = None
        self._requests = Requests()  # until the loop begins
        self._subscription: RemovableHandle | None = None
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )

    @property
    def best_value(self) -> float | None:
        """The best value so far; None before the first that is a number."""
        return self._best.value

    @property
    def best_step(self) -> int | None:
        """How many steps were done when it was measured."""
        return self._best.step

    def _begin(self, args: PipelineHookArgs) -> None:
        self._requests = args.requests
        self._subscription = args.metrics.subscribe(self.cfg.monitor, self._judge, who=self.name)
        self._stop_if_due()  # which a resumed run may have been

    def _end(self, args: PipelineHookArgs) -> None:
        if self._subscription is not None:
            self._subscription.remove()

    def _judge(self, found: MetricValue) -> None:
        self._best.offer(found)
        self._latest = found.value
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        reason = self._reason()
        if reason is not None:
            self._requests.stop(reason, by=self.name)

    def _reason(self) -> str | None:
        cfg, best, latest = self.cfg, self._best, self._latest
        if latest is None:
            return None
        if cfg.stop_on is not None and best.is_as_good(latest, cfg.stop_on):
            return f"{cfg.monitor} is {number_text(latest)}, which reaches stop_on={cfg.stop_on}"
        if cfg.patience is None or best.since < cfg.patience:
            return None
        if best.value is None:
            return f"{cfg.monitor} has had no finite value in {best.since} evaluations"
        return (
            f"{cfg.monitor} has got no better than {number_text(best.value)} (step {best.step}) "
            f"in {best.since} evaluations"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": self._best.state_dict(), "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best.load_state_dict(state["best"])
        self._latest = state["latest"]


class EarlyStoppingConfig(PipelineHooksConfig[EarlyStopping]):
    """Which metric to watch, and when to stop.

    >>> EarlyStoppingConfig(monitor="eval/val/accuracy", mode="max", patience=3)().name
    'EarlyStopping'
    """

    class_type: type[EarlyStopping] = EarlyStopping
    monitor: str = Field(description="The name of the metric, such as 'eval/val/loss'.")
    mode: Mode = Field(description="Whether the smallest ('min') or largest ('max') is best.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations in a row of which none is better.",
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Better is what is better by more than this."
    )
    stop_on: float | None = Field(
        default=None, description="Stop as soon as a value is as good as this."
    )

    def __post_init__(self) -> None:
        if self.patience is None and self.stop_on is None:
            raise ValueError("give patience, in evaluations, or stop_on, a value, or both")
