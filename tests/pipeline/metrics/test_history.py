"""Last and best values of a run, and the curves of its losses."""

from __future__ import annotations

import math

import pytest

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.metrics.history import Curve, MetricHistory


def test_best_values_are_finite_and_the_first_of_equals() -> None:
    """NaN is a last value, never a best one; of equal values, the earliest is best."""
    history = MetricHistory()
    values = [3.0, 1.0, math.inf, 1.0, math.nan]
    history.add(MetricValue("m", value, 10 * step) for step, value in enumerate(values))
    found = history.extremes["m"]
    assert math.isnan(found.last)
    assert found.last_step == 40
    assert (found.best("min"), found.best("max")) == ((1.0, 10), (3.0, 0))
    history.add([MetricValue("bad", math.nan, 10)])
    assert history.extremes["bad"].best("min") is None


def test_curves_have_bounded_memory_and_the_shape_of_the_values() -> None:
    """A million values leave at most 128 means, whose mean is that of the values."""
    curve = Curve()
    for step in range(1_000_000):
        curve.add(float(step % 1000 == 0) + step)
        if step < 128:
            assert len(curve.means) == step + 1
    assert 64 <= len(curve.means) <= 128
    assert curve.means == sorted(curve.means)
    assert curve.sparkline(8) == "▁▂▃▄▅▆▇█"
    curve.add(math.nan)
    assert math.isfinite(curve.means[-1])


def test_a_flat_and_a_short_curve() -> None:
    """Equal values are a flat line; a single value is none."""
    curve = Curve()
    curve.add(0.5)
    assert curve.sparkline(10) == ""
    curve.add(0.5)
    assert curve.sparkline(10) == "▁▁"


def test_the_state_continues_a_history() -> None:
    """A history with a saved state goes on as if nothing had happened; damaged states raise."""
    values = [MetricValue("loss/total", 1 / (1 + step), step) for step in range(1000)]
    whole, first, second = MetricHistory(), MetricHistory(), MetricHistory()
    whole.add(values, ["loss/total"])
    first.add(values[:333], ["loss/total"])
    second.load_state_dict(first.state_dict())
    second.add(values[333:], ["loss/total"])
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(StateError, match="curves"):
        second.load_state_dict(
            {"since": 0, "extremes": [], "curves": [("loss/total", "none", 1, 1)]}
        )
    assert second.state_dict() == whole.state_dict()
