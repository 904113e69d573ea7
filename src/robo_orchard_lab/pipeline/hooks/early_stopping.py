"""Hook that stops the run when a metric stops improving."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.metric_mode import Mode
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.keep_best import BestValue
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.state_schema import Real, StateSchema

STATE_VERSION = 1


class EarlyStopping(PipelineHooks):
    """Early stop of the run when a metric stops improving.

    The hook judges each new value of the metric: ``eval/...`` after each evaluation, other metrics
    after each step that publishes them. NaN and infinities are never an improvement. A run stopped
    this way stops again at once when resumed, unless ``patience`` was raised.

    - Ranks: all; every rank sees the same reduced values.
    - Requests: a stop.
    - State: the best value, its step, the number of values since, and the latest value.
    - Cost: for a step that publishes the metric, see :meth:`MetricsBoard.subscribe`; else none.

    >>> from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
    >>> run = PipelineRun.standalone()
    >>> stopping = EarlyStoppingConfig(monitor="eval/val/loss", mode="min", patience=2)()
    >>> with stopping.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (0.5, 0.7, 0.5):
    ...         run.metrics.publish("eval/val/loss", loss)
    ...         record = run.metrics.flush(log=True)
    >>> run.requests.stop_request.reason
    'eval/val/loss did not improve on 0.5000 (step 0) in 2 evaluations'
    """

    keeps_trajectory = True
    reads = ("metrics",)
    changes = ()
    requests = ("stop",)

    def __init__(self, cfg: EarlyStoppingConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._best = BestValue(cfg.mode, cfg.min_delta)
        self._latest: float | None = None
        self.register_for_loop(self._begin)

    @property
    def best_value(self) -> float | None:
        """Best value so far; None before the first number."""
        return self._best.value

    @property
    def best_step(self) -> int | None:
        """Number of completed steps when the best value was measured."""
        return self._best.step

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        self._stop_if_due(args.requests)  # a resumed run may have stopped before
        args.run.metric_modes[self.cfg.monitor] = self.cfg.mode
        judge = partial(self._judge, args.requests)
        return args.metrics.subscribe(self.cfg.monitor, judge, who=self.name)

    def _judge(self, requests: Requests, found: MetricValue) -> None:
        self._best.update(found)
        self._latest = found.value
        self._stop_if_due(requests)

    def _stop_if_due(self, requests: Requests) -> None:
        cfg, best, latest = self.cfg, self._best, self._latest
        if latest is None:
            return
        if cfg.stop_on is not None and best.reaches(latest, cfg.stop_on):
            reason = f"{cfg.monitor} is {number_text(latest)}, which reaches stop_on={cfg.stop_on}"
        elif cfg.patience is None or best.since < cfg.patience:
            return
        elif best.value is None:
            reason = f"{cfg.monitor} had no finite value in {best.since} evaluations"
        else:
            reason = (
                f"{cfg.monitor} did not improve on {number_text(best.value)} (step {best.step}) "
                f"in {best.since} evaluations"
            )
        requests.stop(reason, by=self.name)

    state_schema = StateSchema(STATE_VERSION, best=BestValue.schema.type, latest=Real | None)

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": self._best.state_dict(), "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best.load_state_dict(state["best"])
        self._latest = state["latest"]


class EarlyStoppingConfig(PipelineHooksConfig[EarlyStopping]):
    """Metric to monitor, and the conditions for a stop.

    >>> EarlyStoppingConfig(monitor="eval/val/accuracy", mode="max", patience=3)().name
    'EarlyStopping'
    """

    class_type: type[EarlyStopping] = EarlyStopping
    monitor: str = Field(description="Metric name, such as 'eval/val/loss'.")
    mode: Mode = Field(description="Best value: the smallest ('min') or the largest ('max').")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many consecutive evaluations without improvement.",
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Least improvement; a smaller one does not count."
    )
    stop_on: float | None = Field(
        default=None, description="Stop as soon as a value is at least as good as this."
    )

    def __post_init__(self) -> None:
        if self.patience is None and self.stop_on is None:
            raise ValueError(
                "got neither patience nor stop_on; set patience=<evaluations> or stop_on=<value>"
            )
