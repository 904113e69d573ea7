"""Where a callable comes from, for people."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
