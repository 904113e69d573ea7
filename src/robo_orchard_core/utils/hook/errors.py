"""Where a callable comes from, for people."""

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

# --- errors ----------------------------------------------------------------------------------
# What goes wrong with hooks, and how errors of hooks are told.
#
# What is done here to an error happens while scopes are being left, so none of it may raise: not
# every exception takes a note or an attribute.


logger = logging.getLogger(__name__)

_ATTRIBUTE = "__later_hook_errors__"
_ORIGIN = "raised in hook "


class HookRegistrationError(ValueError):
    """A hook can't be registered where it was asked to be; the message says what to do."""


class HookSignatureError(TypeError):
    """A callable can't serve as a hook: it can't be called with one argument."""


def later_errors(error: BaseException) -> tuple[BaseException, ...]:
    """The errors that hooks raised while the scopes were left that ``error`` had broken.

    They are in the order in which they were raised. ``error`` carries the text of each as a
    note, too, so that a traceback shows them.
    """
    return tuple(getattr(error, _ATTRIBUTE, ()))


def attach_later_error(first: BaseException, later: BaseException) -> None:
    """Keep ``later`` with ``first``, which stays the one that is raised."""
    known = later_errors(first)
    if later is first or any(later is error for error in known):
        return  # an after-hook that raises ``args.exception`` adds nothing
    try:
        setattr(first, _ATTRIBUTE, (*known, later))
        # Without its context, which is the first error with all of its notes.
        text = "".join(traceback.format_exception(later, chain=False)).rstrip()
        first.add_note("while leaving, another error was raised:\n" + textwrap.indent(text, "  | "))
    except Exception:  # it takes no attribute or note, so the log keeps the later one
        logger.exception("while leaving after %r, another error was raised", first, exc_info=later)


def add_origin(error: BaseException, origin: str) -> None:
    """Note on ``error`` which hook raised it; an error that has such a note keeps its own."""
    try:
        if origin_of(error) is None:
            error.add_note(_ORIGIN + origin)
    except Exception:  # it takes no note
        logger.error("%r was %s%s", error, _ORIGIN, origin)


def origin_of(error: BaseException) -> str | None:
    """Which hook raised ``error``, as its note says it; None where it came from no hook."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, str) and note.startswith(_ORIGIN):
            return note.removeprefix(_ORIGIN)
    return None


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """A description of a callable: what it is, its name, and the line that defines it.

    >>> FunctionInfo.of(print)
    <FunctionInfo builtin print>
    """

    kind: str
    """``function``, ``bound method``, ``partial of ...``, ``object``, ``builtin`` or ``class``."""
    name: str
    """The qualified name; for bound methods and objects with class and id of the instance."""
    file: str | None = None
    """The source file as Python recorded it, or None where there is no Python source."""
    line: int | None = None
    """The first line of the definition (its first decorator, if it has one), from 1."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> FunctionInfo:
        """Describe any callable. This never raises, whatever the object does when looked at."""
        try:
            return cls._describe(function)
        except Exception:  # a description must not take a training down: see "never raises"
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


def _instance_name(instance: object) -> str:
    return f"{type.__getattribute__(type(instance), '__name__')}(id={id(instance)})"


def _source(function: Any) -> tuple[str | None, int | None]:
    """File and line of a Python function, looking through ``functools.wraps``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if inspect.iscode(code) else (None, None)
