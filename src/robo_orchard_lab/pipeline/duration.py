"""A length of time, as a number of seconds and as text."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_UNITS = re.compile(
    r"(?:(?P<d>[\d.]+)\s*(?:d|days?))?\s*(?:(?P<h>[\d.]+)\s*(?:h|hours?))?\s*"
    r"(?:(?P<m>[\d.]+)\s*(?:m|min|minutes?))?\s*(?:(?P<s>[\d.]+)\s*(?:s|sec|seconds?))?"
)
_CLOCK = re.compile(r"(?:(?P<d>\d+)-(?=\d+:\d+:))?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)")


def duration_s(value: Any) -> float:
    """The seconds of a duration: a number of them, or a text.

    >>> duration_s("3h30min"), duration_s("1 d 2 h"), duration_s("90 s"), duration_s(2.5)
    (12600.0, 93600.0, 90.0, 2.5)
    >>> duration_s("1-02:00:00"), duration_s("1:30:00"), duration_s("05:00")  # as SLURM writes it
    (93600.0, 5400.0, 300.0)

    Raises:
        ValueError: it is neither, not finite, or less than 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected seconds or a text such as '3h30min', got {value!r:.60}")
    try:
        seconds = _from_text(value.strip().lower()) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        raise ValueError(
            f"can't read {value!r:.60} as a length of time; write '3h30min', '90 s', '1:30:00' or "
            "a number of seconds"
        ) from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"expected a finite length of time >= 0, got {value!r:.60}")
    return seconds


def _from_text(text: str) -> float:
    found = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    parts = {} if found is None else {k: v for k, v in found.groupdict().items() if v is not None}
    if not parts:
        return float(text)
    return float(sum(float(count) * _SECONDS[unit] for unit, count in parts.items()))


DurationField: TypeAlias = Annotated[float | str, BeforeValidator(duration_s)]
"""How a configuration declares a duration: given as seconds or text, and held as seconds."""
