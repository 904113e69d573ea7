"""What a configuration document may hold, whatever format it is written in.

Plain data only: None, bool, int, finite float, text, lists and dicts with text keys.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import TypeAlias

from robo_orchard_core.utils.config.errors import ConfigFieldError, ConfigSyntaxError, Path

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

MAX_DEPTH = 64
"""Levels of lists and dicts in a document; far above any real configuration, far below the
interpreter's recursion limit."""

MAX_BYTES = 16 * 2**20
"""Size of a document in UTF-8; what is larger is data, and belongs in a file of its own."""


Lines: TypeAlias = dict[Path, int]
"""The line, counted from 1, in which the value at a path begins, or the key that it belongs to."""

MAX_LINES = 20_000
"""Of how many values a reader tells the lines; the rest belong to what is above them."""


class RepeatedKey(dict[str, Plain]):
    """What a parser returns for a mapping that holds a key twice: the checker knows the path."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key


def check(value: object, path: Path = ()) -> Plain:
    """The value as plain data, once every rule of this module holds.

    TOML's dates and times become ISO 8601 text, which is what the other formats hold.

    Raises:
        ConfigSyntaxError: At the path of the first value that breaks a rule.
    """
    if len(path) > MAX_DEPTH:
        # The first levels say enough; a place of 64 of them would hide the message.
        raise ConfigSyntaxError(f"the document is nested deeper than {MAX_DEPTH} levels", path[:8])
    match value:
        case None | bool():
            return value
        case int():
            try:
                str(value)
            except ValueError as error:  # it would be text in a file, and couldn't be read
                raise ConfigSyntaxError(str(error), path) from error
            return value
        case float():
            if not math.isfinite(value):
                raise ConfigSyntaxError(f"expected a finite number, found {value}", path)
            return value
        case str():
            check_text(value, path)
            return value
        case list():
            return [check(item, (*path, index)) for index, item in enumerate(value)]
        case RepeatedKey():
            problem = "the key occurs twice in one mapping; keep one of the two"
            raise ConfigSyntaxError(problem, (*path, value.key))
        case dict():
            return {check_key(key, path): check(item, (*path, key)) for key, item in value.items()}
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            found = type(value).__qualname__
            raise ConfigSyntaxError(f"expected plain data, found an instance of {found}", path)


def check_text(text: str, path: Path) -> None:
    """Refuse what UTF-8 can't hold: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"text can't hold the lone surrogate {text[error.start]!r}"
        raise ConfigSyntaxError(problem, path) from error


def check_key(key: object, path: Path) -> str:
    """The key, once it is text."""
    if not isinstance(key, str):
        raise ConfigSyntaxError(f"expected a key of text, found {key!r}; quote it", path)
    check_text(key, path)
    return key


def first_difference(left: Plain, right: Plain, path: Path = ()) -> Path | None:
    """Where two documents differ: in type, in value, in the sign of a zero, in order; or None."""
    if type(left) is not type(right):
        return path
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return path
        pairs = [((*path, key), left[key], right[key]) for key in left]
    elif isinstance(left, list) and isinstance(right, list):
        if len(left) != len(right):
            return path
        pairs = [((*path, i), a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right and repr(left) == repr(right) else path
    return next((found for p in pairs if (found := first_difference(p[1], p[2], p[0]))), None)


# --- dotted path -----------------------------------------------------------------------------
# From a dotted path, as people write it, to the keys that it leads along.


_KEY = re.compile(r'"(?:[^"\\]|\\.)*"|[^."]+')


def parsed_path(text: str) -> tuple[str, ...]:
    """The keys of a dotted path; one that holds a dot or a quote is written in double quotes.

    >>> parsed_path('lr."layer1.weight".0')
    ('lr', 'layer1.weight', '0')

    Raises:
        ConfigFieldError: It isn't written as a path.
    """
    problem = f"expected keys with dots between them, like trainer.max_epoch; found {text[:80]!r}"
    path: list[str] = []
    end = 0
    while len(path) < MAX_DEPTH and (found := _KEY.match(text, end)):
        key = found[0]
        try:
            path.append(json.loads(key) if key.startswith('"') else key)
        except json.JSONDecodeError:
            raise ConfigFieldError(problem) from None
        end = found.end() + 1
        if end > len(text):
            check_text(text, ())
            return tuple(path)
        if text[end - 1] != ".":
            break
    raise ConfigFieldError(problem)
