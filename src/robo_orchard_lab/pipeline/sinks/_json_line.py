"""A record of metrics as a line of JSON, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue

JsonNumber: TypeAlias = float | str
"""Strict JSON has no words for what is not finite."""

_BEGIN = b'{"epoch_id": '
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COUNTERS = ("epoch_id", "global_step_id", "optimizer_step_id")


def line_of(record: MetricsRecord) -> bytes:
    """The line of a record; the names of each step in alphabetical order."""
    steps = record.by_step()
    document: dict[str, Any] = {name: getattr(record, name) for name in _COUNTERS}
    document["metrics"] = _plain(steps.pop(record.global_step_id, {}))
    if steps:
        document["earlier"] = [{"step": s, "metrics": _plain(steps[s])} for s in steps]
    if record.partial:
        document["partial"] = True
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def record_of(line: bytes) -> MetricsRecord | None:
    """The record of a line, or None if it is none."""
    try:
        document = json.loads(line, parse_constant=_refuse)
        epoch, step, updates = (_count(document.pop(name)) for name in _COUNTERS)
        steps = [*document.pop("earlier", []), {"step": step, "metrics": document.pop("metrics")}]
        partial = document.pop("partial", False)
        if document or type(partial) is not bool:
            return None
        values = tuple(
            MetricValue(name, _number(value), _count(entry["step"]))
            for entry in steps
            for name, value in entry["metrics"].items()
        )
        return MetricsRecord(epoch, step, updates, values, partial)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def is_torn(line: bytes) -> bool:
    """Whether a line that is no record is the begin of one, as a crash leaves it."""
    written = line.rstrip(b"\0")  # some file systems fill up what had no time to be written
    return written.startswith(_BEGIN) or _BEGIN.startswith(written)


def _plain(metrics: Mapping[str, float]) -> dict[str, JsonNumber]:
    return {name: _json_number(metrics[name]) for name in sorted(metrics)}


def _json_number(value: float) -> JsonNumber:
    if math.isfinite(value):
        return value
    return next(text for text, known in _NOT_FINITE.items() if str(known) == str(value))


def _number(value: JsonNumber) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _count(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a counter is an int")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
