"""Whether a run in two parts is the run that never stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest

from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.testing.differences import differences
from robo_orchard_lab.testing.run import HookRun, states_of


def seams(
    straight: HookRun, first: HookRun, second: HookRun, ignored: Sequence[str]
) -> Iterator[str]:
    """What is unlike the straight run, the first difference of each kind.

    Args:
        straight: the run that never stopped.
        first: the run until it was stopped.
        second: the run that went on from there.
        ignored: patterns of the names of metrics and the places in states that may differ.
    """
    saved, loaded = states_of(first.hooks), second.states_at_start
    yield from _first(differences(loaded, saved), ignored, "the loaded state")
    yield from _first(_metric_differences(straight, first, second), ignored, "metric")
    yield from _mismatch("request", straight.requests, [*first.requests, *second.requests])
    yield from _unlike_weights(straight, first, second)
    yield from _first(
        differences(states_of(second.hooks), states_of(straight.hooks)), ignored, "at the end"
    )
    if second.progress != straight.progress:
        yield f"the run ended at {second.progress}, expected {straight.progress}"


def _first(found: Iterable[tuple[str, str]], ignored: Sequence[str], kind: str) -> Iterator[str]:
    for place, problem in found:
        if not any(fnmatchcase(place, pattern) for pattern in ignored):
            yield f"{kind}: {place} {problem}"
            return


def _metric_differences(
    straight: HookRun, first: HookRun, second: HookRun
) -> Iterator[tuple[str, str]]:
    # At its end, the first part has told also what the second has in its next logging point.
    until_the_stop = [record for record in first.records if not record.partial]
    expected, found = _values(straight.records), _values([*until_the_stop, *second.records])
    for name in {**expected, **found}:
        for one, other in zip_longest(found.get(name, ()), expected.get(name, ())):
            if one is None or other is None or [*differences(one, other)]:
                yield name, f"{_told(one)}, expected {_told(other)}"
                break


def _values(records: Iterable[MetricsRecord]) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for value in record.values:
            values.setdefault(value.name, []).append((value.step, value.value))
    return values


def _told(value: tuple[int, float] | None) -> str:
    return "has no further value" if value is None else f"is {value[1]!r} at step {value[0]}"


def _mismatch(kind: str, expected: Sequence[object], found: Sequence[object]) -> Iterator[str]:
    for one, other in zip_longest(found, expected):
        if one != other:
            yield f"{kind}: {one or 'none'}, expected {other or 'none'}"
            return


def _unlike_weights(straight: HookRun, first: HookRun, second: HookRun) -> Iterator[str]:
    weights = [*first.weights_by_step[:-1], *second.weights_by_step]
    for step, (found, expected) in enumerate(zip(weights, straight.weights_by_step, strict=False)):
        for name, problem in differences(found, expected):
            yield f"weights: after step {step}, {name} {problem}"
            return
