"""Hook that keeps the weights of the best value of a metric."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.metric_mode import Mode
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.pretrained_folder import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    card_to_write,
    config_json,
    facts_of_run,
)
from robo_orchard_lab.pipeline.run.durable import remove_leftovers
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharding import non_finite_weights
from robo_orchard_lab.pipeline.state_schema import Count, Real, StateSchema


class BestValue:
    """Best value so far, its step, and the number of values since.

    >>> best = BestValue("min", min_delta=0.1)
    >>> [best.update(MetricValue("loss", x, step=0)) for x in (1.0, 0.95, 0.5, math.nan)]
    [True, False, True, False]
    >>> best.value, best.since
    (0.5, 1)

    NaN and infinities never count as an improvement, not even as the first value.

    Args:
        mode: direction of improvement.
        min_delta: least improvement, >= 0; a tie is never an improvement.
    """

    def __init__(self, mode: Mode, min_delta: float) -> None:
        self._sign = 1.0 if mode == "min" else -1.0
        self._min_delta = min_delta
        self.value: float | None = None
        self.step: int | None = None
        """Number of completed steps when the value was measured."""
        self.since = 0
        """Number of values since, none of them better."""

    def update(self, found: MetricValue) -> bool:
        """Compare the next value; return True if it is the new best."""
        is_better = self.is_better(found.value, self._min_delta)
        if is_better:
            self.value, self.step, self.since = found.value, found.step, 0
        else:
            self.since += 1
        return is_better

    def is_better(self, value: float, min_delta: float = 0.0) -> bool:
        """Return True if a value is finite and better than the best one."""
        best = math.inf if self.value is None else self._sign * self.value
        return math.isfinite(value) and self._sign * value < best - min_delta

    def adopt(self, found: MetricValue) -> bool:
        """Take a value from another source if it is better; return True if it was taken."""
        is_better = self.is_better(found.value)
        if is_better:
            self.value, self.step, self.since = found.value, found.step, 0
        return is_better

    def reaches(self, value: float, threshold: float) -> bool:
        """Return True if a value is at least as good as a threshold; NaN and inf never are."""
        return math.isfinite(value) and self._sign * value <= self._sign * threshold

    schema = StateSchema(value=Real | None, step=Count | None, since=Count)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its step and the count since."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]


logger = job_logger(__name__)

STATE_VERSION = 1
_SUFFIX = ".safetensors"


class KeepBest(PipelineHooks):
    """File with the weights of the best value of a metric.

    At each new best value, the weights of the current commit point are saved: that of the
    evaluation, or of the step that published the metric. NaN and infinities are never the best, nor
    are values of weights that are not finite. The file's metadata holds the metric, its value and
    step, and the counters of the run.

    Weights that can't be written, as on a full disk, stay in host memory until there is room, or
    until a better value; the run ends with an error if there is no room at its end.

    A file named ``model.safetensors`` gets the model's ``config.json`` and its card, README.md,
    next to it, as of ``SaveModel``: ``load_policy`` reads the folder.

    A new run overwrites the file of an earlier one. A resumed run reads the file first: weights
    saved after the resumed checkpoint stay if their value is better.

    - Ranks: all; the main process writes.
    - Requests: writing the weights.
    - State: the best value, its step, and the number of values since.
    - Cost: for a step that publishes the metric, see :meth:`MetricsBoard.subscribe`; for a new best
      value, a read of all weights and, with several ranks, a collective; else none.

    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
    >>> run = PipelineRun.standalone(accelerator=Accelerator(cpu=True))
    >>> keep = KeepBestConfig(monitor="eval/val/loss", mode="min", path="best.safetensors")()
    >>> with keep.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (0.5, 0.4, 0.7):
    ...         run.metrics.publish("eval/val/loss", loss)
    ...         record = run.metrics.flush(log=True)
    >>> keep.best_value
    0.4
    """

    keeps_trajectory = True
    reads = ("metrics", "model.weights", "model.buffers")
    changes = ()
    requests = ("save_weights",)

    def __init__(self, cfg: KeepBestConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._best = BestValue(cfg.mode, cfg.min_delta)
        if cfg.path.name == WEIGHTS_FILE:
            self.declare_effects(changes=["files"], requests=["write"])
        self._is_resumed = False
        self.register_for_loop(self._begin)
        if (weights := cfg.weights) is not None:  # refuses unknown weights before the first step
            self.on_epoch.before(lambda args: args.run.weight_set(weights))

    @property
    def best_value(self) -> float | None:
        """Best value so far; None before the first number."""
        return self._best.value

    @property
    def best_step(self) -> int | None:
        """Number of completed steps when the best value was measured."""
        return self._best.step

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        if args.accelerator.is_main_process:
            self._check_folder(args.run.locate(self.name, "path"))
            remove_leftovers(self.cfg.path)
            if self.cfg.path.name == WEIGHTS_FILE:
                config = config_json(plain_model(args.run), self.name)
                if config is not None:
                    args.run.write_file(
                        self.cfg.path.with_name(CONFIG_FILE), config.encode(), self.name
                    )
        if self._is_resumed:
            self._is_resumed = False
            self._compare_with_file(args)
        args.run.metric_modes[self.cfg.monitor] = self.cfg.mode
        judge = partial(self._judge, args.run)
        return args.metrics.subscribe(self.cfg.monitor, judge, who=self.name)

    def _check_folder(self, place: str) -> None:
        """Fail at the start of the run, not at the first save."""
        folder = self.cfg.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipelineConfigError(
                f"{place}: can't create the folder {folder}: {error}"
            ) from error
        if not os.access(folder, os.W_OK):
            raise PipelineConfigError(f"{place}: the folder {folder} is not writable")

    def _judge(self, run: PipelineRun, found: MetricValue) -> None:
        cfg = self.cfg
        if self._best.is_better(found.value, cfg.min_delta):
            kept = run.weight_set(cfg.weights) if cfg.weights else None
            if names := non_finite_weights(run, kept):  # a collective
                logger.warning(
                    "%s: %s is %s at step %d, the best so far, but %s of the weights is not "
                    "finite; the weights are not kept",
                    *(self.name, cfg.monitor, number_text(found.value), found.step, names[0]),
                )
                found = MetricValue(found.name, math.nan, found.step)
        if self._best.update(found):
            reason = f"{cfg.monitor} is {number_text(found.value)}, the best so far"
            if cfg.path.name == WEIGHTS_FILE:
                run.requests.write(partial(self._write_card, run), reason, by=self.name)
            run.requests.save_weights(
                cfg.path,
                reason,
                by=self.name,
                weights=cfg.weights,
                metadata={
                    "format": "pt",  # required by transformers
                    "monitor": cfg.monitor,
                    "mode": cfg.mode,
                    "value": repr(found.value),
                    "value_step": str(found.step),
                },
            )

    def _write_card(self, run: PipelineRun) -> None:
        path = self.cfg.path.with_name(CARD_FILE)
        if run.accelerator.is_main_process:
            card = card_to_write(path, facts_of_run(run))
            if card is not None:
                run.write_file(path, card, self.name, is_required=False)

    def _compare_with_file(self, args: PipelineHookArgs) -> None:
        found = _read_value(self.cfg) if args.accelerator.is_main_process else None
        if args.accelerator.num_processes > 1:
            found = broadcast_object(found, 0)  # collective; other ranks may not see the file
        best = self._best.value
        if found is not None and self._best.adopt(found):
            logger.info(
                "%s: keeping %s with %s %s (step %d), better than the resumed run's best value",
                *(self.name, self.cfg.path, found.name, number_text(found.value), found.step),
            )
        elif best is not None and (found is None or found.value != best):
            logger.warning(
                "%s: %s lacks the best weights of the resumed run (%s %s); the next better "
                "value overwrites the file",
                *(self.name, self.cfg.path, self.cfg.monitor, number_text(best)),
            )

    state_schema = StateSchema(STATE_VERSION, best=BestValue.schema.type)

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": self._best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best.load_state_dict(state["best"])
        self._is_resumed = True


class KeepBestConfig(PipelineHooksConfig[KeepBest]):
    """Metric to monitor, and the file for the weights.

    >>> KeepBestConfig(monitor="eval/val/loss", mode="min", path="out/best.safetensors")().name
    'KeepBest'
    """

    class_type: type[KeepBest] = KeepBest
    monitor: str = Field(description="Metric name, such as 'eval/val/loss'.")
    mode: Mode = Field(description="Best value: the smallest ('min') or the largest ('max').")
    path: Annotated[Path, RunPath()] = Field(
        description="File to write, *.safetensors; its folder is created. A model.safetensors gets "
        "the model's config.json and card next to it."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Least improvement; a smaller one does not count."
    )
    weights: str | None = Field(
        default=None,
        description="Name of the hook whose weights to save, such as 'EMA'; None for the "
        "model's own.",
    )

    @field_validator("path")
    @classmethod
    def _has_suffix(cls, path: Path) -> Path:
        if path.suffix != _SUFFIX:
            raise ValueError(f"expected a file name ending in {_SUFFIX}, got {str(path)!r}")
        return path


def _read_value(cfg: KeepBestConfig) -> MetricValue | None:
    """Return the metric value stored in the file; None without a file of this metric."""
    try:
        with safe_open(cfg.path, framework="pt") as file:
            metadata = file.metadata() or {}
        if (metadata.get("monitor"), metadata.get("mode")) == (cfg.monitor, cfg.mode):
            return MetricValue(cfg.monitor, float(metadata["value"]), int(metadata["value_step"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # no file, or the file of another program
    return None
