"""JSON in which nothing is silently dropped, rounded or made up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn


class JsonError(ValueError):
    """A text is not JSON, or not such as was written here."""


def parse_json(text: bytes, *, max_depth: int) -> Any:
    """The value that a UTF-8 text stands for.

    Raises:
        JsonError: it isn't JSON, has a key twice in one object, a number that is not finite, or
            is nested deeper than ``max_depth``.

    >>> parse_json(b'{"a": 1, "a": 2}', max_depth=5)
    Traceback (most recent call last):
    robo_orchard_lab.pipeline.checkpoint.strict_json.JsonError: the key 'a' is there twice
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"it is nested deeper than {max_depth}") from None
    except ValueError as error:  # JSON's, UTF-8's, and that of a number with too many digits
        raise JsonError(f"it is not JSON: {error}") from None
    check_depth(value, max_depth)
    return value


def check_depth(value: Any, max_depth: int) -> None:
    """Refuse lists and dicts that lie in one another deeper than ``max_depth``.

    Raises:
        JsonError: they do.
    """
    containers = _containers([value])
    for _ in range(max_depth):
        containers = [
            item
            for container in containers
            for item in _containers(
                container.values() if isinstance(container, dict) else container
            )
        ]
        if not containers:
            return
    if containers:
        raise JsonError(f"it is nested deeper than {max_depth}")


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {key!r:.80} is there twice")
            seen.add(key)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {text:.40} is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not a number of JSON")
