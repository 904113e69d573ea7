"""Whether a run in two parts is the run that never stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

import torch

from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.testing.run import HookRun, states_of

# --- differences -----------------------------------------------------------------------------
# Where two states differ.


def differences(found: Any, expected: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The places where two nested states differ, each with what is wrong there.

    Tensors and numbers have to be equal exactly, where NaN equals NaN.

    >>> list(differences({"count": 2, "best": [0.5]}, {"count": 3, "best": [0.5]}, "MyHook"))
    [('MyHook.count', 'is 2, expected 3')]
    """
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        yield from ((place, problem) for problem in _tensor_differences(found, expected))
    elif isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in {**expected, **found}:
            inner = f"{place}.{key}" if place else str(key)
            if key not in found:
                yield inner, "is missing"
            elif key not in expected:
                yield inner, f"is {found[key]!r:.60}, expected none"
            else:
                yield from differences(found[key], expected[key], inner)
    elif isinstance(found, list | tuple) and type(found) is type(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
        if len(found) != len(expected):
            yield place, f"has {len(found)} items, expected {len(expected)}"
    elif _unlike(found, expected):
        yield place, f"is {found!r:.60}, expected {expected!r:.60}"


def _unlike(found: Any, expected: Any) -> bool:
    if isinstance(found, torch.Tensor) or isinstance(expected, torch.Tensor):
        return True  # both of them are compared by value elsewhere
    return not (found == expected or (found != found and expected != expected))  # NaN


def _tensor_differences(found: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        yield (
            f"is a tensor of {found.dtype} {tuple(found.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
        return
    differing = (found != expected) & ~((found != found) & (expected != expected))
    if differing.any():
        index = tuple(differing.nonzero()[0].tolist())
        yield (
            f"is {found[index].item()!r}, expected {expected[index].item()!r}, at {list(index)} "
            f"({int(differing.sum())} of {found.numel()} elements differ)"
        )


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
