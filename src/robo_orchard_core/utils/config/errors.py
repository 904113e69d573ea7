"""What goes wrong with a configuration, each kind with the place where it went wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Self

Path = tuple[str | int, ...]
"""Where a value lies in a document: keys and list indexes, from the top."""

_BARE = re.compile(r"[^\s.\"]+")


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
