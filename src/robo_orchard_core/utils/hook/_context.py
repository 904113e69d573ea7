"""A hook: one ``before`` and one ``after`` around a body."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic

from robo_orchard_core.utils.hook._errors import HookSignatureError
from robo_orchard_core.utils.hook._function_info import FunctionInfo
from robo_orchard_core.utils.hook._plan import ArgsT, HookEntry, HookFunction, Plan, Scope


class HookContext(ABC, Generic[ArgsT]):
    """A pair of methods that run before and after a body, with one argument that both see.

    ``after`` runs if, and only if, ``before`` returned, also when the body failed; the argument's
    ``exception`` (where it has such an attribute) then holds the error. Return values are ignored.

    Subclasses define :meth:`before` and :meth:`after`; ``on_enter`` and ``on_exit`` are other
    names for the two, to call and to define: a class that defines one has the other.
    """

    name: str | None = None
    """What errors and descriptions call it, or None."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ahead = cls.__mro__[: cls.__mro__.index(HookContext)]
        for pair in (("before", "on_enter"), ("after", "on_exit")):
            classes = (vars(c) for c in ahead if any(name in vars(c) for name in pair))
            defined: Mapping[str, Any] = next(classes, {})
            for name, other in (pair, pair[::-1]):
                if name not in defined and other in defined:
                    setattr(cls, name, defined[other])

    @abstractmethod
    def before(self, args: ArgsT) -> None:
        """Run ahead of the body."""

    @abstractmethod
    def after(self, args: ArgsT) -> None:
        """Run once the body is over, whether it returned or raised."""

    def on_enter(self, args: ArgsT) -> None:
        """Call :meth:`before`."""
        self.before(args)

    def on_exit(self, args: ArgsT) -> None:
        """Call :meth:`after`."""
        self.after(args)

    def functions(self) -> tuple[HookFunction[ArgsT] | None, HookFunction[ArgsT] | None]:
        """What a channel calls: before and after, None for one that does nothing."""
        return self.before, self.after

    def begin(self, args: ArgsT) -> AbstractContextManager[None]:
        """This hook alone around the body of a ``with`` statement."""
        return Scope(Plan("begin", (HookEntry(0, self, *self.functions(), None),)), args)

    @staticmethod
    def from_callable(
        before: HookFunction[ArgsT] | None = None,
        after: HookFunction[ArgsT] | None = None,
        name: str | None = None,
    ) -> HookContextFromCallable[ArgsT]:
        """A hook made of one or two callables.

        Raises:
            HookSignatureError: neither is given, or one can't be called with one argument.
        """
        return HookContextFromCallable(before=before, after=after, name=name)

    def __repr__(self) -> str:
        before, after = (None if f is None else FunctionInfo.of(f) for f in self.functions())
        cls = type(self)
        return (
            f"<{cls.__module__}.{cls.__qualname__}(\n"
            f"  name={self.name}, \n  before={before}, \n  after={after})>"
        )


class HookContextFromCallable(HookContext[ArgsT]):
    """A hook made of one or two callables; see :meth:`HookContext.from_callable`."""

    __module__ = "robo_orchard_core.utils.hook"  # the name to import it by, which printing shows

    def __init__(
        self,
        before: HookFunction[ArgsT] | None = None,
        after: HookFunction[ArgsT] | None = None,
        name: str | None = None,
    ) -> None:
        if before is None and after is None:
            raise HookSignatureError("a hook needs a before or an after callable, got neither")
        for role, function in (("before", before), ("after", after)):
            if function is not None:
                check_signature(function, role)
        self._before = before
        self._after = after
        self.name = name

    def before(self, args: ArgsT) -> None:
        if self._before is not None:
            self._before(args)

    def after(self, args: ArgsT) -> None:
        if self._after is not None:
            self._after(args)

    def functions(self) -> tuple[HookFunction[ArgsT] | None, HookFunction[ArgsT] | None]:
        return self._before, self._after


_NEVER_RUNNING = {
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "asynchronous generator": inspect.isasyncgenfunction,
}


def check_signature(function: object, role: str) -> None:
    """Refuse what can't be called with one positional argument, or whose body would not run.

    Raises:
        HookSignatureError: with the callable's description and what to change.
    """
    if not callable(function):
        raise HookSignatureError(
            f"{role} must be callable with one argument (the hook arguments), "
            f"got {type(function).__name__}"
        )
    described = f"{role}={FunctionInfo.of(function)}"
    try:
        kinds = [kind for kind, is_kind in _NEVER_RUNNING.items() if is_kind(function)]
        signature = inspect.signature(function)
    except Exception:  # some builtins don't tell, and some objects raise when looked at
        return
    if kinds:
        raise HookSignatureError(
            f"{described} is a {kinds[0]} function, whose body would never run; "
            "use a plain function"
        )
    try:
        signature.bind(None)
    except TypeError as error:
        raise HookSignatureError(
            f"{described} can't be called with one argument: {error}. Its signature is "
            f"{signature}; a hook takes exactly one argument, the hook arguments"
        ) from None
