"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo
from robo_orchard_lab.pipeline.errors import PipelineConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept: a checkpoint that any of the rules keeps, stays. Without ``keep_last``, all do.

    Raises:
        PipelineConfigError: a number is too small, or there is no metric to be the best by.

    >>> Retention(keep_last=3, keep_every=1000).keep_best
    0
    """

    keep_last: int | None = None
    """The newest so many; None: all."""
    keep_every: int | None = None
    """Those whose step is a multiple of it."""
    keep_best: int = 0
    """So many of those with the best value of ``monitor``, of equal ones the oldest."""
    monitor: str | None = None
    """A name in the checkpoints' metrics; also says which one is "best"."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_every", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise PipelineConfigError(f"Retention.{name} must be >= {least}, got {value!r}")
        if self.mode not in ("min", "max"):
            raise PipelineConfigError(f"Retention.mode must be 'min' or 'max', got {self.mode!r}")
        if self.keep_best and self.monitor is None:
            raise PipelineConfigError(
                "Retention.keep_best needs to know by which metric; name it as monitor"
            )

    def best(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those that have a value of ``monitor`` that is a number, the best one first."""
        if self.monitor is None:
            return []
        sign = 1 if self.mode == "min" else -1
        values = [(info.metrics.get(self.monitor, math.nan), info) for info in infos]
        ranked = [
            (sign * value, info.serial, info) for value, info in values if not math.isnan(value)
        ]
        return [info for *_, info in sorted(ranked, key=lambda found: found[:2])]

    def reasons(self, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
        """Why each checkpoint that stays does, by its serial."""
        ordered = sorted(infos, key=lambda info: info.serial, reverse=True)
        if self.keep_last is None:
            return {info.serial: "all are kept" for info in ordered}
        found: dict[int, list[str]] = {}

        def keep(info: CheckpointInfo, why: str) -> None:
            found.setdefault(info.serial, []).append(why)

        for info in ordered[: self.keep_last]:
            keep(info, f"one of the last {self.keep_last}")
        for info in ordered:
            if self.keep_every is not None and info.step % self.keep_every == 0:
                keep(info, f"its step is a multiple of {self.keep_every}")
        for place, info in enumerate(self.best(ordered)[: self.keep_best], 1):
            assert self.monitor is not None  # else there is no best
            value = info.metrics[self.monitor]
            keep(info, f"number {place} by {self.monitor}, with {value:g}")
        return {serial: "; ".join(reasons) for serial, reasons in found.items()}
