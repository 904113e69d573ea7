"""Metrics of a run as curves, downsampled with their extremes."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from robo_orchard_lab.metric_mode import Mode as Mode
from robo_orchard_lab.metric_mode import guess_mode as guess_mode
from robo_orchard_lab.report.files import Problems, items, mapping, read_lines, text, whole

MAX_POINTS = 100_000
"""Points of all curves of a page."""
MAX_POINTS_OF_CURVE = 4_000
MAX_CURVES = 400
MAX_NAME = 300
MAX_STEP = 2**50
"""Steps from here on are damage; charts have no axis for them."""
# As JsonLinesSink writes them; its module imports torch.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(slots=True)
class Curve:
    """Values of a metric by step, in the order of steps; one value a step."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """Add a value; a later value of the last step replaces the earlier one."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)

    def sort(self) -> None:
        """Put steps in order, as after damage; of several values of a step, the last counts."""
        if any(after <= before for before, after in pairwise(self.steps)):
            found = dict(zip(self.steps, self.values, strict=True))
            self.steps = array("q", sorted(found))
            self.values = array("d", (found[step] for step in self.steps))

    def best(self, mode: Mode) -> tuple[int, float] | None:
        """Return step and value of the best finite value, the earliest of equals."""
        found = zip(self.steps, self.values, strict=True)
        finite = ((step, value) for step, value in found if math.isfinite(value))
        best = min if mode == "min" else max
        return best(finite, key=lambda point: point[1], default=None)

    def last(self) -> tuple[int, float] | None:
        """Return the last step and value, or None."""
        return (self.steps[-1], self.values[-1]) if self.steps else None

    def to_plain(self, limit: int) -> dict[str, Any]:
        """Return the curve as JSON-compatible values, with at most about ``limit`` points."""
        kept = downsample(self.values, limit)
        bad = [i for i, v in enumerate(self.values) if not math.isfinite(v)]
        return {
            "x": [self.steps[i] for i in kept],
            "y": [number(self.values[i]) for i in kept],
            "points": len(self.steps),
            "non_finite": len(bad),
            "first_non_finite": self.steps[bad[0]] if bad else None,
        }


def number(value: float) -> float | None:
    """Return a number as JSON can hold it: None in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def downsample(values: Sequence[float], limit: int) -> list[int]:
    """Return the indexes of the points to keep, in order.

    Of each bucket, the first, the smallest, the largest and the first non-finite value are kept,
    and of the curve the last; so are all points if ``limit`` suffices.

    >>> downsample([0.0, 5.0, 1.0, 1.0, -3.0, 1.0, 1.0, 2.0], 5)
    [0, 1, 4, 7]
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    buckets = max(1, limit // 4)
    kept = {0, count - 1}
    isfinite = math.isfinite
    for bucket in range(buckets):
        low, high = bucket * count // buckets, (bucket + 1) * count // buckets
        inside = values[low:high]
        finite = [value for value in inside if isfinite(value)]
        if len(finite) < len(inside):
            kept.add(next(low + i for i, value in enumerate(inside) if not isfinite(value)))
        kept.add(low)
        if finite:
            kept.add(low + inside.index(min(finite)))
            kept.add(low + inside.index(max(finite)))
    return sorted(kept)


@dataclass(slots=True)
class Metrics:
    """Curves of a run by name, and the counters of its last record."""

    curves: dict[str, Curve] = field(default_factory=dict)
    last_step: int | None = None
    last_epoch: int | None = None
    invalid: int = 0
    """Number of values that are no numbers."""
    omitted: set[str] = field(default_factory=set)
    """Names beyond the limit of curves."""

    def add(self, record: Mapping[str, Any], prefix: str = "", suffix: str = "") -> None:
        """Add the values of a record whose names begin with ``prefix`` and end with ``suffix``."""
        step = _step(record.get("global_step_id"))
        if step is None:
            self.invalid += 1
            return
        self.last_step = step
        self.last_epoch = whole(record.get("epoch_id"))
        earlier = map(mapping, items(record.get("earlier")))
        entries = [(_step(each.get("step")), each.get("metrics")) for each in earlier]
        entries.append((step, record.get("metrics")))
        for at, values in entries:
            if at is None or not isinstance(values, dict):
                self.invalid += 1
                continue
            for name, value in values.items():
                if isinstance(value, str):
                    value = _NON_FINITE.get(value)
                if type(value) is int:
                    value = float(value) if abs(value) < 1e300 else math.inf
                if type(value) is not float:
                    self.invalid += 1
                    continue
                if not (name.startswith(prefix) and name.endswith(suffix)):
                    continue
                curve = self.curves.get(name)
                if curve is None:
                    if len(self.curves) >= MAX_CURVES:
                        if len(self.omitted) < 10_000:
                            self.omitted.add(name[:MAX_NAME])
                        continue
                    curve = self.curves.setdefault(name, Curve())
                curve.add(at, value)


def read_metrics(path: Path, problems: Problems, prefix: str = "", suffix: str = "") -> Metrics:
    """Read the curves of a metrics file; damaged records are counted in a problem.

    Args:
        path: metrics.jsonl of a run.
        problems: receives the problems.
        prefix: beginning of the names to read, such as ``eval/``; lines without are not parsed.
        suffix: end of the names to read.
    """
    metrics = Metrics()
    mark = json.dumps(suffix)[1:] if suffix else json.dumps(prefix)[:-1]  # as in the file
    for record in read_lines(path, problems, mark.encode() if prefix or suffix else b""):
        metrics.add(record, prefix, suffix)
    for curve in metrics.curves.values():
        curve.sort()
    if metrics.invalid:
        one = f"a value of {path.name} is no number and is left out"
        values = f"{metrics.invalid:,} values of {path.name} are no numbers and are left out"
        problems.add(one if metrics.invalid == 1 else values)
    if metrics.omitted:
        problems.add(
            f"{path.name} has more than {MAX_CURVES} metrics; {len(metrics.omitted):,} are left out"
        )
    return metrics


def _step(value: Any) -> int | None:
    step = whole(value)
    return step if step is not None and 0 <= step < MAX_STEP else None


def to_plain(metrics: Metrics, budget: int = MAX_POINTS) -> dict[str, dict[str, Any]]:
    """Return all curves as JSON-compatible values, with about ``budget`` points in total."""
    # Short curves leave their share to long ones.
    lengths = sorted(len(curve.steps) for curve in metrics.curves.values())
    rest, limit = budget, MAX_POINTS_OF_CURVE
    for index, length in enumerate(lengths):
        share = rest // (len(lengths) - index)
        if length > share:
            limit = max(8, min(limit, share))
            break
        rest -= length
    found: dict[str, dict[str, Any]] = {}
    numbers = count(2)
    for name, curve in sorted(metrics.curves.items()):
        shown = name = text(name, limit=MAX_NAME)
        while shown in found:  # of long names with one beginning
            shown = f"{name} ({next(numbers)})"
        found[shown] = curve.to_plain(limit)
    return found
