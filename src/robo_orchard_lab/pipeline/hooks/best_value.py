"""Comparison of metric values: the best value so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from robo_orchard_lab.pipeline.metrics import MetricValue

Mode: TypeAlias = Literal["min", "max"]
"""Direction of improvement: the smallest or the largest value is best."""


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
        best = math.inf if self.value is None else self._sign * self.value
        is_better = math.isfinite(found.value) and self._sign * found.value < best - self._min_delta
        if is_better:
            self.value, self.step, self.since = found.value, found.step, 0
        else:
            self.since += 1
        return is_better

    def adopt(self, found: MetricValue) -> bool:
        """Take a value from another source if it is better; return True if it was taken."""
        best = math.inf if self.value is None else self._sign * self.value
        is_better = math.isfinite(found.value) and self._sign * found.value < best
        if is_better:
            self.value, self.step, self.since = found.value, found.step, 0
        return is_better

    def reaches(self, value: float, threshold: float) -> bool:
        """Return True if a value is at least as good as a threshold; NaN and inf never are."""
        return math.isfinite(value) and self._sign * value <= self._sign * threshold

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its step and the count since."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
