"""Strict reader of traces in Chrome's trace event format."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Slice:
    """Complete event, with the events inside."""

    name: str
    start: float
    end: float
    args: dict[str, Any]
    inside: list[Slice] = field(default_factory=list)

    def paths(self, above: str = "") -> list[str]:
        """Return the path of this event and of all inside, such as ``on_step/on_batch``."""
        path = f"{above}/{self.name}" if above else self.name
        return [path, *(found for each in self.inside for found in each.paths(path))]


def read_trace(path: Path) -> dict[str, list[Slice]]:
    """Return the outermost events of each process by its name; each assertion is a rule."""
    document = json.loads(path.read_bytes(), parse_constant=_refuse)
    assert document["displayTimeUnit"] in ("ms", "ns")
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    names: dict[int, str] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        for number in ("pid", "tid"):
            assert type(event[number]) is int
        assert isinstance(event["args"], dict)
        assert event["ts"] >= 0
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            if event["name"] == "process_name":
                assert event["pid"] not in names
                names[event["pid"]] = event["args"]["name"]
        else:
            assert event["ph"] == "X"
            assert isinstance(event["cat"], str)
            assert event["dur"] >= 0
            by_thread[event["pid"], event["tid"]].append(event)
    assert {pid for pid, _ in by_thread} == set(names)
    return {names[pid]: _nest(events) for (pid, _), events in by_thread.items()}


def _nest(events: list[dict[str, Any]]) -> list[Slice]:
    """Nest the events of a thread, which are in order of time, the outer ones first."""
    outermost: list[Slice] = []
    open_slices: list[Slice] = []
    before = 0.0
    for event in events:
        found = Slice(event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
        assert found.start >= before
        before = found.start
        while open_slices and open_slices[-1].end <= found.start:
            open_slices.pop()
        if open_slices:
            assert found.end <= open_slices[-1].end, f"{found} crosses the end of its parent"
            open_slices[-1].inside.append(found)
        else:
            outermost.append(found)
        open_slices.append(found)
    return outermost


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
