"""Errors of hooks, and descriptions of callables with their source line.

Functions that change an error run while scopes exit, so none of them may raise: some exceptions
accept neither notes nor attributes.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_ATTRIBUTE = "__later_hook_errors__"
CONFIGURED_AT = "configured at "
"""Begin of the note that names the place of a hook's configuration."""
_ORIGIN = "raised in hook "
_OWN_PACKAGES = ("robo_orchard_core", "robo_orchard_lab")
_LONGEST_PATH = 40


class HookRegistrationError(ValueError):
    """Invalid registration of a hook."""


class HookSignatureError(TypeError):
    """Callable with a wrong signature for a hook, or without a plain body."""


def later_errors(error: BaseException) -> tuple[BaseException, ...]:
    """Return errors of hooks that exited after ``error``, in order.

    Tracebacks of ``error`` show each later error as a note.
    """
    return tuple(getattr(error, _ATTRIBUTE, ()))


def attach_later_error(first: BaseException, later: BaseException) -> None:
    """Attach ``later`` to ``first``; ``first`` propagates."""
    known = later_errors(first)
    if later is first or any(later is error for error in known):
        return  # an after that raises ``args.exception`` again
    try:
        setattr(first, _ATTRIBUTE, (*known, later))
        # The chain would repeat the first error with all of its notes.
        text = "".join(traceback.format_exception(later, chain=False)).rstrip()
        first.add_note("while exiting, another error was raised:\n" + textwrap.indent(text, "  | "))
    except Exception:  # no attributes or notes: log the later error
        logger.exception("while exiting after %r, another error was raised", first, exc_info=later)


def add_origin(error: BaseException, origin: str) -> None:
    """Add a note with the origin of ``error``, unless present."""
    try:
        if origin_of(error) is None:
            error.add_note(_ORIGIN + origin)
    except Exception:  # no notes
        logger.error("%r was %s%s", error, _ORIGIN, origin)


def origin_of(error: BaseException) -> str | None:
    """Return the hook that raised ``error``, from its note, or None."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, str) and note.startswith(_ORIGIN):
            return note.removeprefix(_ORIGIN)
    return None


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """Kind, name and source line of a callable.

    >>> FunctionInfo.of(print)
    <FunctionInfo builtin print>
    """

    kind: str
    """``function``, ``bound method``, ``partial of ...``, ``object``, ``builtin`` or ``class``."""
    name: str
    """Qualified name; for bound methods and objects, with class and id of the instance."""
    file: str | None = None
    """Source file, or None without Python source."""
    line: int | None = None
    """First line of the definition, including decorators, from 1."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> FunctionInfo:
        """Describe any callable; never raises, even if the object does on inspection."""
        try:
            return cls._describe(function)
        except Exception:  # a description must not end a training
            return cls("object", _instance_name(function))

    @classmethod
    def _describe(cls, function: Callable[..., Any]) -> FunctionInfo:
        if isinstance(function, functools.partial):
            inner = cls.of(function.func)
            return cls(f"partial of {inner.kind}", inner.name, inner.file, inner.line)
        if inspect.ismethod(function):
            owner = function.__self__
            name = owner.__name__ if isinstance(owner, type) else _instance_name(owner)
            return cls("bound method", f"{name}.{function.__name__}", *_source(function.__func__))
        if inspect.isbuiltin(function):
            return cls("builtin", function.__qualname__)
        if inspect.isfunction(function):
            wrapped: Any = getattr(function, "__wrapped__", None)
            if callable(wrapped) and not inspect.isfunction(wrapped):  # a method, a partial
                return cls.of(wrapped)
            return cls("function", function.__qualname__, *_source(function))
        if isinstance(function, type):
            return cls(
                "class", function.__qualname__, *_source(vars(function).get("__init__", object))
            )
        return cls("object", _instance_name(function), *_source(type(function).__call__))

    @property
    def location(self) -> str | None:
        """``file:line`` relative to the working directory, or None without Python source."""
        if self.file is None:
            return None
        try:
            file = os.path.relpath(self.file)
        except (OSError, ValueError):  # the working directory is gone, or on another drive
            file = self.file
        return f"{file}:{self.line}"

    def __repr__(self) -> str:
        location = self.location
        return f"<FunctionInfo {self.kind} {self.name}{f' from {location}' if location else ''}>"


def short_location(location: str) -> str:
    """Shorten a location in an installed package, or outside of the working folder.

    >>> short_location(".venv/lib/python3.12/site-packages/robo_orchard_lab/pipeline/plan.py:53")
    'robo_orchard_lab/.../plan.py:53'
    >>> short_location("my_project/hooks.py:12"), short_location("../../data/a/b/hooks.py:7")
    ('my_project/hooks.py:12', '.../b/hooks.py:7')
    """
    parts = location.replace(os.sep, "/").split("/")
    for at, part in enumerate(parts[:-1]):
        package = at + (part in ("site-packages", "dist-packages"))
        if package > at or part in _OWN_PACKAGES:
            inner = parts[package:]
            return "/".join(inner if len(inner) < 3 else (inner[0], "...", inner[-1]))
    if len(location) <= _LONGEST_PATH and parts[0] not in ("", ".."):
        return location
    return "/".join((*(["..."] * (len(parts) > 2)), *parts[-2:]))


def _instance_name(instance: object) -> str:
    return f"{type.__getattribute__(type(instance), '__name__')}(id={id(instance)})"


def _source(function: Any) -> tuple[str | None, int | None]:
    """Return file and line of a Python function, unwrapped from ``functools.wraps``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if inspect.iscode(code) else (None, None)
