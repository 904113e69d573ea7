"""Where two states differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


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
