"""Keep the weights with which a metric was best."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.best_value import BestValue, Mode
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import remove_leftovers
from robo_orchard_lab.pipeline.run.run_path import RunPath

logger = job_logger(__name__)

STATE_VERSION = 1
_SUFFIX = ".safetensors"


class KeepBest(PipelineHooks):
    """Asks the trainer to save the weights whenever a metric is better than ever.

    They are those of the commit point at which the value is known: for ``eval/...`` those that
    were evaluated, for other metrics those at the logging point. The file says which metric it is,
    its value, its step, and the counters of the run.

    A new run replaces what an earlier one has left. A resumed one also looks into the file: where
    the run before it has come further than its last save, and found better weights, they stay.

    It runs on every rank; the first one writes. It costs a step nothing.

    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline.context import PipelineRun
    >>> run = PipelineRun(accelerator=Accelerator(cpu=True))
    >>> keep = KeepBestConfig(monitor="eval/val/loss", mode="min", path="best.safetensors")()
    >>> with keep.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (0.5, 0.4, 0.7):
    ...         run.metrics.publish("eval/val/loss", loss)
    ...         record = run.metrics.flush(log=True)
    >>> keep.best_value
    0.4
    """

    keeps_trajectory = True

    def __init__(self, cfg: KeepBestConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._best = BestValue(cfg.mode, cfg.min_delta)
        self._resumed = False
        self._requests = Requests()  # until the loop begins
        self._subscription: RemovableHandle | None = None
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        if cfg.weights is not None:
            self.register_hook("on_epoch", HookContext.from_callable(before=self._check_weights))

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
        if args.accelerator.is_main_process:
            self._check_folder()
            remove_leftovers(self.cfg.path)
        if self._resumed:
            self._resumed = False
            self._look_into_file(args)

    def _check_folder(self) -> None:
        """Before a device is busy, not when the first weights are to be kept."""
        folder = self.cfg.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipelineConfigError(
                f"{self.name}.path: can't make the folder {folder}: {error}"
            ) from error
        if not os.access(folder, os.W_OK):
            raise PipelineConfigError(f"{self.name}.path: the folder {folder} can't be written to")

    def _end(self, args: PipelineHookArgs) -> None:
        if self._subscription is not None:
            self._subscription.remove()

    def _check_weights(self, args: PipelineHookArgs) -> None:
        assert self.cfg.weights is not None  # else this is not registered
        args.run.weight_set(self.cfg.weights)  # an error where there is none of that name

    def _judge(self, found: MetricValue) -> None:
        cfg = self.cfg
        if self._best.offer(found):
            self._requests.save_weights(
                cfg.path,
                f"{cfg.monitor} is {number_text(found.value)}, the best so far",
                by=self.name,
                weights=cfg.weights,
                metadata={
                    "monitor": cfg.monitor,
                    "mode": cfg.mode,
                    "value": repr(found.value),
                    "value_step": str(found.step),
                },
            )

    def _look_into_file(self, args: PipelineHookArgs) -> None:
        found = _value_in(self.cfg) if args.accelerator.is_main_process else None
        if args.accelerator.num_processes > 1:
            found = _of_first_rank(found, self.cfg.monitor, args.accelerator)
        if found is None:
            if self._best.value is not None:
                logger.warning(
                    "%s: %s does not have the best weights of the run that is resumed, with %s of "
                    "%s; it will be written with the next better value",
                    *(self.name, self.cfg.path, self.cfg.monitor, number_text(self._best.value)),
                )
        elif self._best.keep(found):
            logger.info(
                "%s: %s has %s of %s (step %d), better than the resumed run knows of; it stays",
                *(self.name, self.cfg.path, found.name, number_text(found.value), found.step),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": self._best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best.load_state_dict(state["best"])
        self._resumed = True


class KeepBestConfig(PipelineHooksConfig[KeepBest]):
    """Which metric to watch, and where to keep the weights.

    >>> KeepBestConfig(monitor="eval/val/loss", mode="min", path="out/best.safetensors")().name
    'KeepBest'
    """

    class_type: type[KeepBest] = KeepBest
    monitor: str = Field(description="The name of the metric, such as 'eval/val/loss'.")
    mode: Mode = Field(description="Whether the smallest ('min') or largest ('max') is best.")
    path: Annotated[Path, RunPath()] = Field(
        description="The file to write, *.safetensors; its folder is made."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Better is what is better by more than this."
    )
    weights: str | None = Field(
        default=None,
        description="The name of the hook whose weights to save, such as that of an EMA; by "
        "default the model's own.",
    )

    @field_validator("path")
    @classmethod
    def _has_suffix(cls, path: Path) -> Path:
        if path.suffix != _SUFFIX:
            raise ValueError(f"the file's name must end with {_SUFFIX}, got {str(path)!r}")
        return path


def _value_in(cfg: KeepBestConfig) -> MetricValue | None:
    """The value that the weights in the file were saved for; None without such weights."""
    try:
        with safe_open(cfg.path, framework="pt") as file:
            metadata = file.metadata() or {}
        if (metadata.get("monitor"), metadata.get("mode")) == (cfg.monitor, cfg.mode):
            return MetricValue(cfg.monitor, float(metadata["value"]), int(metadata["value_step"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # there is none, or another program's
    return None


def _of_first_rank(found: MetricValue | None, name: str, accelerator: Any) -> MetricValue | None:
    """What the first rank has found, since the others may not see its file."""
    from accelerate.utils import broadcast

    value, step = (math.nan, 0) if found is None else (found.value, found.step)
    sent = torch.tensor([value, step], dtype=torch.float64, device=accelerator.device)
    value, step = broadcast(sent).tolist()  # a collective, and waiting for the device; once a run
    return None if math.isnan(value) else MetricValue(name, value, int(step))
