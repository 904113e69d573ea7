"""Strict JSON for configs and checkpoints.

Duplicate keys, non-finite numbers and deep nesting are errors with a path. Python's own parser
keeps the last duplicate, accepts NaN, and ends deep nesting in a RecursionError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes from the top of a document to a value."""


class JsonError(ValueError):
    """Violation of strict JSON.

    Attributes:
        problem: Expectation, finding and remedy, without the path.
        path: Path of the value, where known.
        position: ``line 3, column 5`` for syntax errors.
    """

    def __init__(self, problem: str, position: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: Path = ()
        self.position = position

    def __str__(self) -> str:
        where = self.position or ".".join(f"{key:.80}" for key in map(str, self.path[:8]))
        return f"{self.problem} (at {where})" if where else self.problem


class _DuplicateKey(dict[str, Any]):
    """Parsed object that holds one key twice; `check_json` reports the key with its path."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key


def parse_json(text: str | bytes, *, max_depth: int, max_values: int | None = None) -> Any:
    """Parse JSON text, as bytes in UTF-8.

    Args:
        text: The document.
        max_depth: Number of containers that may be nested in one another.
        max_values: Largest :func:`json_values` of the text, checked before parsing.

    >>> parse_json(b'{"a": [1, {"b": 2, "b": 3}]}', max_depth=5)
    Traceback (most recent call last):
    robo_orchard_core.utils.strict_json.JsonError: the key occurs twice in one mapping; \
keep one of the two (at a.1.b)

    Raises:
        JsonError: The text is not JSON, or `check_json` refuses the value.
    """
    try:
        if max_values is not None and (found := json_values(text)) > max_values:
            raise JsonError(f"it has about {found} values; at most {max_values} are read")
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_object)
        return check_json(value, max_depth)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise JsonError(f"broken JSON: {error.msg}", position) from error
    except RecursionError:
        raise JsonError(f"nested deeper than {max_depth} levels") from None
    except ValueError as error:  # invalid UTF-8, or an integer of too many digits
        raise JsonError(f"broken JSON: {error}") from error


def json_values(text: str | bytes) -> int:
    """Return an upper bound of the values and keys in JSON text, without parsing.

    >>> json_values('{"a": [1, 2]}')
    5
    """
    if isinstance(text, str):
        return 1 + sum(map(text.count, ",:[{"))
    return 1 + len(text) - len(text.translate(None, b",:[{"))  # twice as fast as count()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                return _DuplicateKey(key)
            seen.add(key)
    return found


def check_scalar(value: Any) -> Any:
    """Return `value` unless it is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise JsonError(f"expected a finite number, found {value}")
    return value


def check_json(
    value: Any, max_depth: int, scalar: Callable[[Any], Any] = check_scalar, depth: int = 0
) -> Any:
    """Return a copy of plain data after checking depth, keys and scalars.

    Args:
        value: Lists, dicts and scalars.
        max_depth: Number of containers that may be nested in one another.
        scalar: Check or convert scalars and keys; raises JsonError for bad ones.
        depth: Number of containers around `value` that count as well.

    Raises:
        JsonError: With the path of the first value that breaks a rule.
    """
    if not isinstance(value, dict | list):
        return scalar(value)
    if depth == max_depth:
        raise JsonError(f"nested deeper than {max_depth} levels")
    key: str | int | None = None
    try:
        if isinstance(value, list):
            items = []
            for key, item in enumerate(value):  # noqa: B007 - read where an error passes
                items.append(check_json(item, max_depth, scalar, depth + 1))
            return items
        if isinstance(value, _DuplicateKey):
            key = value.key
            raise JsonError("the key occurs twice in one mapping; keep one of the two")
        copy = {}
        for name, item in value.items():
            key = None
            if not isinstance(name, str):
                raise JsonError(f"expected a key of text, found {name!r}; quote it")
            checked = scalar(name)
            key = name
            copy[checked] = check_json(item, max_depth, scalar, depth + 1)
        return copy
    except JsonError as error:
        if key is not None:
            error.path = (key, *error.path)
        raise
