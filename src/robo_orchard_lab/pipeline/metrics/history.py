"""Last and best values of a run's metrics, and the curve of its losses, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import Any

from robo_orchard_lab.metric_mode import Mode
from robo_orchard_lab.pipeline.metrics.accumulators import MetricValue
from robo_orchard_lab.pipeline.state_schema import Count, Real, StateSchema, Text

_MAX_MEANS = 128
_BLOCKS = "▁▂▃▄▅▆▇█"
_SCHEMA = StateSchema(
    since=Count,
    extremes=list[tuple[Text, Real, Count, Real, Count, Real, Count]],
    curves=list[tuple[Text, list[Real], Count, Count]],
)


@dataclass(slots=True)
class Extremes:
    """Last, least and largest value of a metric, each with its step; NaN and inf only as last."""

    last: float = math.nan
    last_step: int = 0
    least: float = math.inf
    least_step: int = 0
    largest: float = -math.inf
    largest_step: int = 0

    def add(self, value: float, step: int) -> None:
        self.last, self.last_step = value, step
        if math.isfinite(value):
            if value < self.least:
                self.least, self.least_step = value, step
            if value > self.largest:
                self.largest, self.largest_step = value, step

    def best(self, mode: Mode) -> tuple[float, int] | None:
        """Return value and step of the first best finite value, or None."""
        if not math.isfinite(self.least):
            return None
        least = self.least, self.least_step
        return least if mode == "min" else (self.largest, self.largest_step)


@dataclass(slots=True)
class Curve:
    """Means of equally many consecutive finite values; at most 128 means.

    >>> curve = Curve()
    >>> for value in range(1000):
    ...     curve.add(1 / (1 + value))
    >>> curve.sparkline(10)
    '█▂▁▁▁▁▁▁▁▁'
    """

    means: list[float] = field(default_factory=list)
    per_mean: int = 1
    """Number of values in each mean, except for the last mean."""
    in_last: int = 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        if self.means and self.in_last < self.per_mean:
            self.in_last += 1
            self.means[-1] += (value - self.means[-1]) / self.in_last
            return
        if len(self.means) == _MAX_MEANS:  # an even number of full means
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means = [(one + other) / 2 for one, other in pairs]
            self.per_mean *= 2
        self.means.append(value)
        self.in_last = 1

    def sparkline(self, width: int) -> str:
        """Return the curve as at most ``width`` block characters; "" with fewer than two means."""
        count = min(width, len(self.means))
        if count < 2:
            return ""
        edges = [len(self.means) * i // count for i in range(count + 1)]
        heights = [sum(self.means[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, spread = min(heights), max(heights) - min(heights)
        top = len(_BLOCKS) - 1
        return "".join(_BLOCKS[round((h - low) / spread * top) if spread else 0] for h in heights)


class MetricHistory:
    """Last and best values of metrics, and curves of losses; saved with the run.

    Args:
        since: completed steps before the first value.
    """

    def __init__(self, since: int = 0) -> None:
        self.since = since
        self.extremes: dict[str, Extremes] = {}
        self.curves: dict[str, Curve] = {}

    def add(self, values: Iterable[MetricValue], curves: Collection[str] = ()) -> None:
        """Add values in step order; those of the names in ``curves`` to their curves, too."""
        for value in values:
            is_first = value.name not in self.extremes
            extremes = self.extremes.setdefault(value.name, Extremes())
            if value.name in curves and (is_first or value.step > extremes.last_step):
                self.curves.setdefault(value.name, Curve()).add(value.value)
            if value.step >= extremes.last_step:
                extremes.add(value.value, value.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "since": self.since,
            "extremes": [(name, *astuple(each)) for name, each in self.extremes.items()],
            "curves": [(name, *astuple(each)) for name, each in self.curves.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; raises a StateError without a change if it is not one."""
        _SCHEMA.check(state, "metric history")
        self.since = state["since"]
        self.extremes = {name: Extremes(*rest) for name, *rest in state["extremes"]}
        self.curves = {name: Curve(list(means), *rest) for name, means, *rest in state["curves"]}
