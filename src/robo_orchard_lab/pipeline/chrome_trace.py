"""Traces in Chrome's format, to view in Perfetto (https://ui.perfetto.dev) or chrome://tracing.

In Chrome's trace event format, complete events (``ph`` is ``X``) have a begin ``ts`` and a duration
``dur`` in microseconds, and nest by time in a process ``pid`` and a thread ``tid``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robo_orchard_lab.pipeline.hook_times import Part, StepSpans

_TICKS_PER_US = 64  # sums of `ts` and `dur` are exact in binary, so that spans nest exactly


def trace_events(steps: Sequence[StepSpans], clock_offset_s: float) -> list[dict[str, Any]]:
    """Return the events of one rank, without ``pid`` and ``tid``; the outer ones first.

    Args:
        steps: consecutive steps.
        clock_offset_s: the system's time minus that of ``perf_counter``, to align ranks.
    """
    events: list[dict[str, Any]] = []
    started: dict[Part, dict[str, Any]] = {}  # channels that outlast their first step

    def add(name: str, kind: str, start_s: float, end_s: float, **args: Any) -> dict[str, Any]:
        ts, end = (round((s + clock_offset_s) * 1e6 * _TICKS_PER_US) for s in (start_s, end_s))
        event = {"name": name, "cat": kind, "ph": "X", "ts": ts, "dur": end - ts, "args": args}
        events.append(event)
        return event

    for step, times, spans, owners in steps:
        last = len(times) - 1
        for part, start, end, _ in spans:
            if part.phase == "body" and part.stage in ("data_wait", "trainer"):
                continue  # as long as the channel, without its hooks
            open_event = started.pop(part, None)
            if open_event is not None and start == 0:
                now = round((times[end] + clock_offset_s) * 1e6 * _TICKS_PER_US)
                open_event["dur"] = now - open_event["ts"]
            else:
                name, kind, about = _described(part)
                open_event = add(name, kind, times[start], times[end], step=step, **about)
            if end == last:
                started[part] = open_event
        for interval, owner in enumerate(owners):
            if owner is not None and owner.stage == "data_wait":
                add("data_wait", "stage", *times[interval : interval + 2], step=step)
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    return events


def _described(part: Part) -> tuple[str, str, dict[str, Any]]:
    """Return the name, category and arguments of a part's events."""
    if part.hook is not None:
        about = {"channel": part.channel, "phase": part.phase, "position": part.position}
        return part.hook, "hook", about
    return (part.stage, "stage", {}) if part.phase == "body" else (part.channel, "channel", {})


def trace_document(events_by_rank: Mapping[int, Iterable[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return a trace with one process for each rank; the first event begins at 0."""
    ranks = {rank: list(events) for rank, events in events_by_rank.items()}
    begin = min((event["ts"] for events in ranks.values() for event in events), default=0)
    found: list[dict[str, Any]] = []
    for rank, events in ranks.items():
        place = {"pid": rank, "tid": 0}
        names = {"process_name": f"rank {rank}", "thread_name": "training"}
        found += [
            {"name": kind, "ph": "M", "ts": 0, **place, "args": {"name": name}}
            for kind, name in names.items()
        ]
        for event in events:
            ts, dur = (ticks / _TICKS_PER_US for ticks in (event["ts"] - begin, event["dur"]))
            found.append({**event, **place, "ts": ts, "dur": dur})
    return {"displayTimeUnit": "ns", "traceEvents": found}
