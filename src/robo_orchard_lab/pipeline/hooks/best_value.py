"""Which of the values of a metric is the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from robo_orchard_lab.pipeline.metrics import MetricValue

Mode: TypeAlias = Literal["min", "max"]
"""Whether the smallest or the largest value is the best."""


class BestValue:
    """The best value so far, its step, and how many came after it.

    >>> best = BestValue("min", min_delta=0.1)
    >>> [best.offer(MetricValue("loss", x, step=0)) for x in (1.0, 0.95, 0.5, math.nan)]
    [True, False, True, False]
    >>> best.value, best.since
    (0.5, 1)

    NaN, and the infinity on the worse side, are never better, also where there is no value yet.

    Args:
        mode: which value is better.
        min_delta: better is what is better by more than this, >= 0; a tie never is.
    """

    def __init__(self, mode: Mode, min_delta: float) -> None:
        self._sign = 1.0 if mode == "min" else -1.0
        self._min_delta = min_delta
        self.value: float | None = None
        self.step: int | None = None
        """How many steps of the run were done when it was measured."""
        self.since = 0
        """How many values have come after it, none of them better."""

    def offer(self, found: MetricValue) -> bool:
        """Take in the next value; gives whether it is the best now."""
        best = math.inf if self.value is None else self._sign * self.value
        better = self._sign * found.value < best - self._min_delta
        if better:
            self.value, self.step, self.since = found.value, found.step, 0
        else:
            self.since += 1
        return better

    def keep(self, found: MetricValue) -> bool:
        """Take over a value that was found elsewhere, if it is better; gives whether it is."""
        better = self.value is None or self._sign * found.value < self._sign * self.value
        if better:
            self.value, self.step, self.since = found.value, found.step, 0
        return better

    def is_as_good(self, value: float, threshold: float) -> bool:
        """Whether a value is as good as a threshold; NaN is not."""
        return self._sign * value <= self._sign * threshold

    def state_dict(self) -> dict[str, Any]:
        """The best value and what is known of it."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
