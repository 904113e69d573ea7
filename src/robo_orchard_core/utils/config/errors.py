"""Errors of configurations, each with the path of the wrong value, and spelling suggestions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from robo_orchard_core.utils.strict_json import Path as Path

_MAX_SHOWN = 4  # further problems in the text of an error


_BARE = re.compile(r"[^\s.\"]+")
_KEY = re.compile(r'"(?:[^"\\]|\\.)*"|[^."]+')
_MAX_KEYS = 64


def dotted(path: Iterable[str | int]) -> str:
    """Return a path as text. Keys with dots, spaces or control characters are quoted.

    >>> dotted(("hooks", 0, "step_log_freq"))
    'hooks.0.step_log_freq'
    >>> dotted(("lr", "layer1.weight"))
    'lr."layer1.weight"'
    """
    return ".".join(
        key
        if _BARE.fullmatch(key) and key.isprintable()
        else json.dumps(key, ensure_ascii=not key.isprintable())
        for key in map(str, path)
    )


def parse_path(text: str) -> tuple[str, ...]:
    """Parse a dotted path; a key with a dot or a quote is written in double quotes.

    >>> parse_path('lr."layer1.weight".0')
    ('lr', 'layer1.weight', '0')
    """
    path: list[str] = []
    end = 0
    while len(path) < _MAX_KEYS and (found := _KEY.match(text, end)):
        key = found[0]
        try:
            key.encode()
            path.append(json.loads(key) if key.startswith('"') else key)
        except ValueError:  # malformed JSON, or half of a surrogate pair
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
    """Failure to read, write or build a configuration.

    Attributes:
        problem: Expectation, finding and remedy, without the path.
        path: Keys and indexes from the top of the document to the value.
        source: File that was read, if any.
        others: Further problems of the same document.
    """

    def __init__(self, problem: str, path: Path = ()) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path
        self.source: str | None = None
        self.others: tuple[ConfigError, ...] = ()

    @property
    def location(self) -> str:
        """Dotted path, as in ``hooks.stats.step_log_freq``; empty for the document itself."""
        return dotted(self.path)

    def is_related_to(self, path: Path) -> bool:
        """Return True if the value is at this path, inside or around."""
        length = min(len(path), len(self.path))
        return path[:length] == self.path[:length]

    def under(self, path: Path) -> Self:
        """Prepend the path of the enclosing value and return this error."""
        self.path = (*path, *self.path)
        return self

    def _line(self) -> str:
        return f"{self.location}: {self.problem}" if self.location else self.problem

    def __str__(self) -> str:
        head = f"{self.source}: {self._line()}" if self.source else self._line()
        shown = [f"also {other._line()}" for other in self.others[:_MAX_SHOWN]]
        more = len(self.others) - len(shown)
        return "\n".join([head, *shown, *([f"and {more} more"] if more else [])])


@contextmanager
def at_path(*path: str | int) -> Iterator[None]:
    """Prepend the path of an enclosing value to config errors raised in a block."""
    try:
        yield
    except ConfigError as error:
        error.under(path)
        raise


class ConfigSyntaxError(ConfigError):
    """Malformed document: broken, truncated, too deep, or with duplicate keys, NaN or tags.

    Attributes:
        position: ``line 3, column 5``, if the parser reports a position.
    """

    def __init__(self, problem: str, path: Path = (), position: str = "") -> None:
        super().__init__(problem, path)
        self.position = position

    @property
    def location(self) -> str:
        """Dotted path, else the position in the text."""
        return dotted(self.path) or self.position

    def _line(self) -> str:
        has_both = self.path and self.position
        return f"{super()._line()} ({self.position})" if has_both else super()._line()


class ConfigFieldError(ConfigError):
    """Missing or unknown field, or a value that its declaration refuses."""


class ConfigReferenceError(ConfigError):
    """Reference ``module:QualName`` to no code of the declared kind."""


class TrustError(ConfigReferenceError):
    """Reference to code outside the trusted packages; nothing was imported."""


class ConfigSaveError(ConfigError):
    """Value without an exact representation in a file."""


class ConfigBuildError(ConfigError):
    """Mismatch between a configuration and the parameters of its class or function."""


MAX_PROBLEMS = 100
"""Maximum number of problems reported for a document."""

_MAX_LENGTH = 500


def config_error(error: ValidationError, document: object) -> ConfigError:
    """Convert pydantic's error to a ConfigError with paths, the most severe problem first."""
    found: list[ConfigError] = []
    nested: list[ConfigError] = []
    for details in error.errors(include_url=False):
        problem = _problem(details, document)
        nested += problem.others
        if not problem.path:  # a rule across fields: name the class
            problem.problem = f"{error.title}: {problem.problem}"
        # A problem inside a value precedes one of the value: in a union, it says the most.
        path = problem.path
        outer = (
            index
            for index, other in enumerate(found)
            if len(other.path) < len(path) and path[: len(other.path)] == other.path
        )
        found.insert(next(outer, len(found)), problem)
    severe = (TrustError, ConfigReferenceError, ConfigError)
    first, *others = sorted(
        [*found, *nested], key=lambda each: [isinstance(each, kind) for kind in severe].index(True)
    )
    first.others = tuple(others[: MAX_PROBLEMS - 1])
    return first


def validate_value(name: str, value: object, declaration: Any) -> Any:
    """Validate a value for a field of this name and type.

    >>> validate_value("lr", 1, float)
    1.0
    """
    values = {name: value}
    try:
        return TypeAdapter(dict[str, declaration]).validate_python(values)[name]
    except ValidationError as error:
        raise config_error(error, values) from error


def _problem(details: ErrorDetails, document: object) -> ConfigError:
    is_missing = details["type"] == "missing"
    path = _locate(details["loc"], document, is_missing=is_missing)
    raised = details.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        for each in (raised, *raised.others):
            each.problem = shorten(each.problem)
            each.under(path)
        return raised
    if raised is not None:
        return ConfigFieldError(shorten(str(raised)), path)
    if is_missing:
        return ConfigFieldError("a value is required here and none is given", path)
    return ConfigFieldError(f"{details['msg']}, found {describe(details['input'])}", path)


def _locate(loc: Path, document: Any, *, is_missing: bool) -> Path:
    """Return pydantic's location without its labels for unions and wrappers."""
    path: list[str | int] = []
    for number, key in enumerate(loc):
        is_index = isinstance(document, list) and isinstance(key, int) and key < len(document)
        if is_index or (isinstance(document, Mapping) and key in document):
            document = document[key]
        elif not (is_missing and number == len(loc) - 1):
            continue
        path.append(key)
    return tuple(path)


def shorten(text: str, length: int = _MAX_LENGTH) -> str:
    """Return text of at most ``length`` characters.

    >>> shorten("robo_orchard_lab", 10)
    'robo_or...'
    """
    return text if len(text) <= length else f"{text[: length - 3]}..."


def describe(value: object) -> str:
    """Return a value and its type, short enough for a message.

    >>> describe("abc")
    "'abc' (str)"
    """
    return f"{shorten(repr(value), 60)} ({type(value).__qualname__})"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``did you mean 'lr'?`` for the most similar known name, or an empty text.

    >>> did_you_mean("lrr", ["lr", "momentum"])
    "did you mean 'lr'?"

    Args:
        name: Unknown name.
        known: Names to search.
        cutoff: Similarity from 0 to 1 that a suggestion needs, as in `difflib`.
    """
    names = [*known]
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if not near:  # for example, ema for EMA
        in_lower_case = {each.casefold(): each for each in names}
        found = difflib.get_close_matches(name.casefold(), in_lower_case, n=1, cutoff=cutoff)
        near = [in_lower_case[each] for each in found]
    return f"did you mean {near[0]!r}?" if near else ""


def suggest_name(name: str, known: Collection[str], lead: str) -> str:
    """Return the most similar known name, or the known names after ``lead``, at most 50.

    >>> suggest_name("lrr", ["lr", "momentum"], "there is")
    "did you mean 'lr'?"
    >>> suggest_name("speed", ["lr", "momentum"], "there is")
    'there is lr, momentum'
    """
    names = [*islice(known, 50), *["..."] * (len(known) > 50)]
    return did_you_mean(name, known) or f"{lead} {', '.join(names) or 'none'}"


def unknown_field(
    name: str, known: Iterable[str], owner: str, path: Path = (), remedy: str = ""
) -> ConfigFieldError:
    """Return the error for an unknown field of ``owner``.

    The advice is the remedy if any, after a nearly equal field, else the most similar field.
    """
    near = did_you_mean(name, known, cutoff=0.9) if remedy else ""
    advice = f"{near} {remedy}".strip() or suggest_name(name, sorted(known), "it has")
    return ConfigFieldError(f"{owner} has no such field; {advice}", (*path, name))
