"""What goes wrong with a configuration, each kind with the place where it went wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from robo_orchard_core.utils.strict_json import Path as Path

_BARE = re.compile(r"[^\s.\"]+")
_KEY = re.compile(r'"(?:[^"\\]|\\.)*"|[^."]+')
_MAX_KEYS = 64


def dotted(path: Iterable[str | int]) -> str:
    """The path as people write it.

    >>> dotted(("hooks", 0, "step_log_freq"))
    'hooks.0.step_log_freq'
    >>> dotted(("lr", "layer1.weight"))
    'lr."layer1.weight"'
    """
    return ".".join(_written(str(part)) for part in path)


def _written(key: str) -> str:
    # What a terminal would obey instead of showing it, and what can't be seen, is escaped.
    if _BARE.fullmatch(key) and key.isprintable():
        return key
    return json.dumps(key, ensure_ascii=not key.isprintable())


def parse_path(text: str) -> tuple[str, ...]:
    """Parse a dotted path; a key that holds a dot or a quote is written in double quotes.

    >>> parse_path('lr."layer1.weight".0')
    ('lr', 'layer1.weight', '0')

    Raises:
        ConfigFieldError: The text is not a dotted path.
    """
    path: list[str] = []
    end = 0
    while len(path) < _MAX_KEYS and (found := _KEY.match(text, end)):
        key = found[0]
        try:
            key.encode()
            path.append(json.loads(key) if key.startswith('"') else key)
        except ValueError:  # no JSON string, or half of a surrogate pair
            break
        end = found.end() + 1
        if end > len(text):
            return tuple(path)
        if text[end - 1] != ".":
            break
    raise ConfigFieldError(
        f"expected keys with dots between them, like trainer.max_epoch; found {text[:80]!r}"
    )


class ConfigError(ValueError):
    """A configuration that can't be read, written or built.

    Attributes:
        problem: What was expected, what was found and what to change, without the place.
        path: Keys and indexes from the top of the document to the value.
        source: The file it was read from, where there was one.
        others: Further problems found in the same document.
    """

    def __init__(self, problem: str, path: Path = ()) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path
        self.source: str | None = None
        self.others: tuple[ConfigError, ...] = ()

    @property
    def place(self) -> str:
        """The dotted path, as in ``hooks.stats.step_log_freq``; empty for the document itself."""
        return dotted(self.path)

    def under(self, path: Path) -> Self:
        """The same error, seen from a document that holds this one at ``path``; changes it."""
        self.path = (*path, *self.path)
        return self

    def _line(self) -> str:
        return f"{self.place}: {self.problem}" if self.place else self.problem

    def __str__(self) -> str:
        head = f"{self.source}: {self._line()}" if self.source else self._line()
        return "\n".join([head, *(f"also {other._line()}" for other in self.others)])


class ConfigSyntaxError(ConfigError):
    """A text that is no document: broken, cut, too deep, repeated keys, not finite, tagged.

    Attributes:
        position: ``line 3, column 5``, where the parser knows it.
    """

    def __init__(self, problem: str, path: Path = (), position: str = "") -> None:
        super().__init__(problem, path)
        self.position = position

    @property
    def place(self) -> str:
        """The dotted path where it is known, else the position in the text."""
        return dotted(self.path) or self.position

    def _line(self) -> str:
        known = self.path and self.position
        return f"{super()._line()} ({self.position})" if known else super()._line()


class ConfigFieldError(ConfigError):
    """A field that is missing, unknown, or holds what its declaration refuses."""


class ConfigReferenceError(ConfigError):
    """A ``module:QualName`` that doesn't lead to code of the declared kind."""


class TrustError(ConfigReferenceError):
    """A reference that leads outside what the loader trusts; nothing was imported."""


class ConfigSaveError(ConfigError):
    """A value that would not come back from a file exactly as it is."""


class ConfigBuildError(ConfigError):
    """A class or function that can't be called with what its configuration holds."""


# --- problems --------------------------------------------------------------------------------
# From pydantic's account of what is wrong to errors that name the place.


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


def validate_value(name: str, value: object, declaration: Any) -> Any:
    """The value as a field of this name would hold it.

    >>> validate_value("lr", 1, float)
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
    return ConfigFieldError(f"{details['msg']}, found {describe(details['input'])}", path)


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


def describe(value: object) -> str:
    """The value and its type, short enough for a message.

    >>> describe("abc")
    "'abc' (str)"
    """
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__qualname__})"


def unknown_field(name: str, known: Iterable[str], owner: str, path: Path = ()) -> ConfigFieldError:
    """The error for a field that ``owner`` doesn't have, with the nearest one that it has."""
    advice = suggest_name(name, sorted(known), "it has")
    return ConfigFieldError(f"{owner} has no such field; {advice}", (*path, name))


def suggest_name(name: str, known: Sequence[str], lead: str) -> str:
    """What to write instead of a name that isn't there: the nearest one, or which there are.

    >>> suggest_name("lrr", ["lr", "momentum"], "there is")
    "did you mean 'lr'?"
    >>> suggest_name("speed", ["lr", "momentum"], "there is")
    'there is lr, momentum'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{lead} {', '.join(known) or 'none'}"
