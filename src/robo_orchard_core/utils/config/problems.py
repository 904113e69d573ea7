"""From pydantic's account of what is wrong to errors that name the place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    Path,
    TrustError,
)

_SHOWN = 10
_LONGEST = 500


def config_error(error: ValidationError, document: object) -> ConfigError:
    """One error for all that pydantic found in the document, the gravest first."""
    found = [_one(details, document) for details in error.errors(include_url=False)]
    for problem in found:
        if not problem.path:  # the rules of the whole: name it by its class
            problem.problem = f"{error.title}: {problem.problem}"
    found = _inner_first(found)
    found.sort(key=_gravity)
    first, *others = found
    first.others = tuple(others[: _SHOWN - 1])
    return first


def _inner_first(problems: list[ConfigError]) -> list[ConfigError]:
    """The same in their order, but one within a value ahead of those of the value.

    Where a union admits several kinds, what is wrong within one of them says the most.
    """
    ordered: list[ConfigError] = []
    for problem in problems:
        path = problem.path
        outer = (
            place
            for place, other in enumerate(ordered)
            if len(other.path) < len(path) and path[: len(other.path)] == other.path
        )
        ordered.insert(next(outer, len(ordered)), problem)
    return ordered


def as_declared(name: str, value: object, declaration: Any) -> Any:
    """The value as a field of this name would hold it.

    >>> as_declared("lr", 1, float)
    1.0

    Raises:
        ConfigError: The declaration refuses it; the place begins with the name.
    """
    values = {name: value}
    try:
        return TypeAdapter(dict[str, declaration]).validate_python(values)[name]
    except ValidationError as error:
        raise config_error(error, values) from error


def _gravity(error: ConfigError) -> int:
    return next(
        (g for g, kind in enumerate((TrustError, ConfigReferenceError)) if isinstance(error, kind)),
        2,
    )


def _one(details: ErrorDetails, document: object) -> ConfigError:
    path = _locate(details["loc"], document, missing=details["type"] == "missing")
    raised = details.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        raised.problem = _clipped(raised.problem)
        return raised.under(path)
    if raised is not None:
        return ConfigFieldError(_clipped(str(raised)), path)
    if details["type"] == "missing":
        return ConfigFieldError("a value is required here and none is given", path)
    return ConfigFieldError(f"{details['msg']}, found {shown(details['input'])}", path)


def _locate(loc: Path, document: object, *, missing: bool) -> Path:
    """The path in the document: pydantic's location without its labels for unions and wrappers."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        inside = _inside(document, part)
        if inside is not _NOTHING:
            document = inside
        elif not (missing and number == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


_NOTHING = object()


def _inside(document: object, part: str | int) -> object:
    if isinstance(document, Mapping):
        return document.get(part, _NOTHING)
    if isinstance(document, list) and isinstance(part, int) and part < len(document):
        return document[part]
    return _NOTHING


def _clipped(text: str) -> str:
    """A message, of which some hold all of a value."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def shown(value: object) -> str:
    """The value and its type, short enough for a message.

    >>> shown("abc")
    "'abc' (str)"
    """
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__qualname__})"


def unknown_field(name: str, known: Iterable[str], owner: str, path: Path = ()) -> ConfigFieldError:
    """The error for a field that ``owner`` doesn't have, with the nearest one that it has."""
    advice = nearest_or_all(name, sorted(known), "it has")
    return ConfigFieldError(f"{owner} has no such field; {advice}", (*path, name))


def nearest_or_all(name: str, known: Sequence[str], lead: str) -> str:
    """What to write instead of a name that isn't there: the nearest one, or which there are.

    >>> nearest_or_all("lrr", ["lr", "momentum"], "there is")
    "did you mean 'lr'?"
    >>> nearest_or_all("speed", ["lr", "momentum"], "there is")
    'there is lr, momentum'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{lead} {', '.join(known) or 'none'}"
