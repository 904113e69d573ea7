"""The short text of a schedule."""

from __future__ import annotations

import re
from collections.abc import Callable

from robo_orchard_lab.pipeline.schedule.base import AnyOf, Schedule, ScheduleError
from robo_orchard_lab.pipeline.schedule.clock import EverySeconds
from robo_orchard_lab.pipeline.schedule.counted import (
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySteps,
    First,
    Last,
)


def parse(text: str) -> Schedule:
    """The schedule that a text describes; see :meth:`Schedule.parse`."""
    parts = [_parse_part(part.strip(), text) for part in text.split("|")]
    return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))


_PATTERNS: tuple[tuple[str, Callable[[str], Schedule]], ...] = (
    (r"(\d+)\s*steps?", lambda n: EverySteps(int(n))),
    (r"(\d+)\s*optimizer[ _]steps?", lambda n: EveryOptimizerSteps(int(n))),
    (r"(\d+)\s*epochs?", lambda n: EveryEpochs(int(n))),
    (r"([\d.e+-]+)\s*(?:s|sec|seconds?)", lambda s: EverySeconds(float(s))),
    (r"([\d.e+-]+)\s*(?:min|minutes?)", lambda s: EverySeconds(float(s) * 60)),
    (r"([\d.e+-]+)\s*(?:h|hours?)", lambda s: EverySeconds(float(s) * 3600)),
    (r"at steps?\s+(\d+(?:\s*,\s*\d+)*)", lambda text: AtSteps(map(int, text.split(",")))),
    (r"(first)", lambda _: First()),
    (r"(last)", lambda _: Last()),
)


_ANY_PART = rf"\s*(?:{'|'.join(pattern for pattern, _ in _PATTERNS)})\s*"
_KINDS = (
    "'100 steps', '50 optimizer steps', '1 epoch', '30 s', '10 min', '2 h', 'at steps 10, 20', "
    "'first' or 'last', several joined by '|'"
)
JSON_SCHEMA = {
    "type": "string",
    "pattern": rf"^{_ANY_PART}(?:\|{_ANY_PART})*$",  # which has no way to say: in either case
    "examples": ["100 steps | 1 epoch", "50 optimizer steps", "10 min", "at steps 10, 20", "last"],
    "patternErrorMessage": f"write {_KINDS}",  # which editors show
}
"""What JSON Schema says of the text of a schedule."""


def _parse_part(part: str, text: str) -> Schedule:
    for pattern, make in _PATTERNS:
        found = re.fullmatch(pattern, part, re.IGNORECASE)
        if found:
            try:
                return make(found[1])
            except ScheduleError as error:
                raise ScheduleError(f"{part!r}: {error}") from None
            except ValueError:  # no number after all, such as 1.2.3
                break
    raise ScheduleError(
        f"can't read {part!r:.80}"
        + (f" in {text!r:.80}" if part != text else "")
        + f" as a schedule; write {_KINDS}"
    )
