"""Channels: ordered hooks around a stage, their contexts and their dispatch."""

from __future__ import annotations

import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import takewhile
from operator import length_hint
from types import GenericAlias
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

from robo_orchard_core.utils.hook.errors import (
    FunctionInfo,
    HookRegistrationError,
    HookSignatureError,
    add_origin,
    attach_later_error,
)


class RemovableHandle:
    """Idempotent handle to remove a registration.

    Remove by ``handle()``, ``handle.remove()`` or the end of a ``with`` block. A later registration
    of the same hook has a handle of its own. ``RemovableHandle[...]`` is allowed in annotations.
    """

    __slots__ = ("_remove",)
    __class_getitem__ = classmethod(GenericAlias)  # type: ignore[var-annotated]

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[[], None] | None = remove

    @property
    def removed(self) -> bool:
        """True if the registration was removed by this handle."""
        return self._remove is None

    def remove(self) -> None:
        """Remove the hook. An open scope still exits the hook."""
        if self._remove is not None:
            remove, self._remove = self._remove, None
            remove()

    def __call__(self) -> None:
        self.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


RemoveableHandle = RemovableHandle  # the spelling of RoboOrchard's tutorial

ArgsT = TypeVar("ArgsT")
HookFunction: TypeAlias = Callable[[ArgsT], Any]


class HookOwner(Protocol):
    """Owner of hooks, named in errors and descriptions."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class HookEntry(Generic[ArgsT]):
    """Hook in a channel's order of execution; position 0 is the outermost."""

    position: int
    context: HookContext[ArgsT]
    before: HookFunction[ArgsT] | None
    after: HookFunction[ArgsT] | None
    owner: HookOwner | None

    @property
    def label(self) -> str:
        """Name in errors: of the hook, else of the owner, else of the class."""
        if self.context.name is not None:
            return self.context.name
        return self.owner.name if self.owner is not None else type(self.context).__name__


EntryWrapper: TypeAlias = Callable[[tuple[HookEntry[ArgsT], ...]], Iterable[HookEntry[ArgsT]]]
"""Function that returns the entries to run in place of a channel's entries."""


class Plan(Generic[ArgsT]):
    """Immutable, precomputed functions of a channel; rebuilt after each change.

    ``entries`` are the registered hooks, ``to_run`` what wrappers made of them.
    """

    __slots__ = ("afters", "befores", "channel", "entries", "to_enter", "to_exit", "to_run")

    def __init__(
        self,
        channel: str,
        entries: tuple[HookEntry[ArgsT], ...],
        to_run: tuple[HookEntry[ArgsT], ...] | None = None,
    ) -> None:
        self.channel = channel
        self.entries = entries
        self.to_run = to_run = entries if to_run is None else to_run
        self.to_enter = tuple(entry for entry in to_run if entry.before is not None)
        self.to_exit = tuple(entry for entry in reversed(to_run) if entry.after is not None)
        self.befores = tuple(entry.before for entry in to_run if entry.before is not None)
        self.afters = tuple(entry.after for entry in reversed(to_run) if entry.after is not None)

    def failed_to_enter(
        self, args: ArgsT, error: BaseException, entering: Iterator[HookFunction[ArgsT]]
    ) -> None:
        """Exit entered hooks after a ``before`` raised ``error``."""
        failed = self.to_enter[len(self.to_enter) - length_hint(entering) - 1]
        self._note_origin(error, failed, "before")
        entered = takewhile(lambda entry: entry is not failed, self.to_run)
        to_exit = [entry for entry in entered if entry.after is not None]
        self.unwind(args, error, reversed(to_exit))

    def failed_to_exit(
        self, args: ArgsT, error: BaseException, exiting: Iterator[HookFunction[ArgsT]]
    ) -> None:
        """Exit the remaining hooks after an ``after`` raised ``error``."""
        first_open = len(self.to_exit) - length_hint(exiting)
        self._note_origin(error, self.to_exit[first_open - 1], "after")
        self.unwind(args, error, self.to_exit[first_open:])

    def unwind(
        self, args: ArgsT, error: BaseException, to_exit: Iterable[HookEntry[ArgsT]]
    ) -> None:
        """Run all afters of ``to_exit`` with ``args.exception`` set; attach errors they raise.

        Arguments with a method ``failing(error)`` set ``exception`` by it, and may report the
        error before the afters, which may take long.
        """
        before = getattr(args, "exception", None)
        _set_exception(args, error)
        for entry in to_exit:
            assert entry.after is not None
            try:
                entry.after(args)
            except BaseException as later:
                self._note_origin(later, entry, "after")
                attach_later_error(error, later)
        # The error's traceback refers to the arguments. A reference back would keep both alive
        # until the garbage collector runs.
        _set_exception(args, before)

    def _note_origin(self, error: BaseException, entry: HookEntry[ArgsT], role: str) -> None:
        function = FunctionInfo.of(entry.before if role == "before" else entry.after)  # type: ignore[arg-type]  # the one that ran
        add_origin(
            error,
            f"{entry.label!r} ({self.channel}, {role}): {function.kind} {function.name}"
            + (f" from {function.location}" if function.location else ""),
        )


def _set_exception(args: Any, error: BaseException | None) -> None:
    with suppress(Exception):  # read-only, or the report fails; hooks must exit nevertheless
        if (failing := getattr(args, "failing", None)) is not None:
            failing(error)
        elif hasattr(args, "exception"):
            args.exception = error


EMPTY: Plan[Any] = Plan("", ())


@dataclass(slots=True, eq=False)
class Scope(AbstractContextManager[ArgsT], Generic[ArgsT]):
    """Context manager for a plan around a ``with`` body."""

    plan: Plan[ArgsT]
    args: ArgsT

    def __enter__(self) -> ArgsT:
        entering = iter(self.plan.befores)
        try:
            for before in entering:
                before(self.args)
        except BaseException as error:
            self.plan.failed_to_enter(self.args, error, entering)
            raise
        return self.args

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.plan.unwind(self.args, error, self.plan.to_exit)
            return
        exiting = iter(self.plan.afters)
        try:
            for after in exiting:
                after(self.args)
        except BaseException as failure:
            self.plan.failed_to_exit(self.args, failure, exiting)
            raise


class HookContext(ABC, Generic[ArgsT]):
    """Pair of methods around a body, with a shared argument.

    ``after`` runs if, and only if, ``before`` returned. If the body fails, the argument's
    ``exception`` attribute holds the error. Return values are ignored.

    Subclasses define :meth:`before` and :meth:`after`, or their aliases ``on_enter`` and
    ``on_exit``.
    """

    name: str | None = None
    """Name in errors and descriptions."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own_classes = cls.__mro__[: cls.__mro__.index(HookContext)]
        for pair in (("before", "on_enter"), ("after", "on_exit")):
            classes = (vars(c) for c in own_classes if any(name in vars(c) for name in pair))
            defined: Mapping[str, Any] = next(classes, {})
            for name, other in (pair, pair[::-1]):
                if name not in defined and other in defined:
                    setattr(cls, name, defined[other])

    @abstractmethod
    def before(self, args: ArgsT) -> None:
        """Run before the body."""

    @abstractmethod
    def after(self, args: ArgsT) -> None:
        """Run after the body returned or raised."""

    def on_enter(self, args: ArgsT) -> None:
        """Call :meth:`before`."""
        self.before(args)

    def on_exit(self, args: ArgsT) -> None:
        """Call :meth:`after`."""
        self.after(args)

    def functions(self) -> tuple[HookFunction[ArgsT] | None, HookFunction[ArgsT] | None]:
        """Return before and after as a channel calls them; None for no operation."""
        return self.before, self.after

    def begin(self, args: ArgsT) -> AbstractContextManager[ArgsT]:
        """Run this hook around the body of ``with``, which gets ``args``."""
        return Scope(Plan("begin", (HookEntry(0, self, *self.functions(), None),)), args)

    @staticmethod
    def from_callable(
        before: HookFunction[ArgsT] | None = None,
        after: HookFunction[ArgsT] | None = None,
        name: str | None = None,
    ) -> HookContextFromCallable[ArgsT]:
        """Make a hook from one or two callables.

        Raises:
            HookSignatureError: Both are None, a callable doesn't accept one argument, or the
                name is not a string.
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
    """Hook made from one or two callables; see :meth:`HookContext.from_callable`."""

    __module__ = "robo_orchard_core.utils.hook"  # the public name, shown by print

    def __init__(
        self,
        before: HookFunction[ArgsT] | None = None,
        after: HookFunction[ArgsT] | None = None,
        name: str | None = None,
    ) -> None:
        if before is None and after is None:
            raise HookSignatureError("a hook needs a before or an after callable, got neither")
        if not isinstance(name, str | None):
            raise HookSignatureError(
                f"name must be a string, got {FunctionInfo.of(name)}; the order of arguments is "
                "(before, after, name), so pass before=... and after=... by name"
            )
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


_NEVER_RUN = {
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "asynchronous generator": inspect.isasyncgenfunction,
}


def check_signature(function: object, role: str) -> None:
    """Refuse callables of a wrong signature, and coroutine or generator functions."""
    if not callable(function):
        raise HookSignatureError(
            f"{role} must be callable with one argument (the hook arguments), "
            f"got {type(function).__name__}"
        )
    described = f"{role}={FunctionInfo.of(function)}"
    try:
        kinds = [kind for kind, is_assignable in _NEVER_RUN.items() if is_assignable(function)]
        signature = inspect.signature(function)
    except Exception:  # some builtins have no signature, and some objects raise on inspection
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
            f"{signature}; a hook accepts exactly one argument, the hook arguments"
        ) from None


ResultT = TypeVar("ResultT")


class HookContextChannel(Generic[ArgsT]):
    """Hooks, entered in the order of registration and exited in reverse.

    ``run`` in short::

        for hook in hooks: hook.before(args)
        result = body(args)
        for hook in reversed(hooks): hook.after(args)
        return result

    If a ``before``, the body or an ``after`` raises, every entered hook still exits, with
    ``args.exception`` set to the error. The first error propagates, with a note that names the
    hook; later errors are attached (:func:`later_errors`).

    A channel can be registered in another channel of its name, and its hooks then run at that
    position. Registration and removal while a channel is open take effect at the next entry.
    """

    __module__ = "robo_orchard_core.utils.hook"  # the public name, shown by print

    __slots__ = ("_owner", "_parents", "_plan", "_registrations", "_wrappers", "name")

    def __init__(self, name: str, owner: HookOwner | None = None) -> None:
        self.name = name
        self._owner = owner
        self._registrations: list[_Registration[ArgsT]] = []
        self._parents: list[HookContextChannel[ArgsT]] = []
        self._wrappers: list[EntryWrapper[ArgsT]] = []
        self._plan: Plan[ArgsT] | None = None  # None: rebuilt at the next use

    def register(self, hook: HookContext[ArgsT] | HookContextChannel[ArgsT]) -> RemovableHandle:
        """Add a hook, or another channel's hooks, as the innermost.

        Raises:
            HookRegistrationError: The hook is registered already, the channels form a cycle, or
                have different names.
            HookSignatureError: A before or after doesn't accept one argument.
        """
        if isinstance(hook, HookContextChannel):
            if hook._holds(self):
                raise HookRegistrationError(f"channel {self.name} can't be registered in itself")
            if hook.name != self.name:
                raise HookRegistrationError(
                    f"{self.name} requires hooks of {self.name}, got the channel {hook.name}, "
                    f"whose hooks run elsewhere; register a channel named {self.name!r}"
                )
        elif isinstance(hook, HookContext):
            for role, function in zip(("before", "after"), hook.functions(), strict=True):
                if function is not None:
                    check_signature(function, role)
        else:
            raise HookRegistrationError(
                f"{self.name} requires a HookContext, got {type(hook).__name__}; make one with "
                "HookContext.from_callable(before=..., after=...)"
            )
        if any(registration.hook is hook for registration in self._registrations):
            raise HookRegistrationError(
                f"this hook is registered in {self.name} already: {hook!r}; remove it first, "
                "or register another"
            )
        registration = _Registration(hook)
        self._registrations.append(registration)
        if isinstance(hook, HookContextChannel):
            hook._parents.append(self)
        self._changed()
        return RemovableHandle(lambda: self._remove(registration))

    def wrap(self, wrapper: EntryWrapper[ArgsT]) -> RemovableHandle:
        """Run the entries that ``wrapper(entries)`` returns, for example with timed functions.

        The wrapper is called after each change of the hooks, not at each entry: a channel without
        wrappers has no cost. It may replace functions by :func:`dataclasses.replace`, and add
        entries, but sees only the hooks of this channel and of the channels in which this one is
        registered: of all of them, in the outermost. Descriptions show the registered hooks.
        """
        self._wrappers.append(wrapper)
        self._changed()

        def remove() -> None:
            self._wrappers.remove(wrapper)
            self._changed()

        return RemovableHandle(remove)

    def unregister_all(self) -> None:
        """Remove all hooks and invalidate their handles."""
        for registration in tuple(self._registrations):
            self._remove(registration)

    def run(self, args: ArgsT, body: Callable[[ArgsT], ResultT]) -> ResultT:
        """Run ``body(args)`` inside all hooks and return its result."""
        plan = self._plan
        if plan is None:
            plan = self._build()
        if plan is EMPTY:
            return body(args)
        # The step path: plain loops over precomputed tuples. The iterator identifies a failed hook
        # afterwards, at no cost without failures.
        entering = iter(plan.befores)
        try:
            for before in entering:
                before(args)
        except BaseException as error:
            plan.failed_to_enter(args, error, entering)
            raise
        try:
            result = body(args)
        except BaseException as error:
            plan.unwind(args, error, plan.to_exit)
            raise
        exiting = iter(plan.afters)
        try:
            for after in exiting:
                after(args)
        except BaseException as error:
            plan.failed_to_exit(args, error, exiting)
            raise
        return result

    def begin(self, args: ArgsT) -> AbstractContextManager[ArgsT]:
        """Run all hooks around the body of ``with``, as :meth:`run` does; yields ``args``."""
        return Scope(self._plan or self._build(), args)

    def entries(self) -> tuple[HookEntry[ArgsT], ...]:
        """Return all hooks in the order of entry, including nested channels."""
        return (self._plan or self._build()).entries

    def __iter__(self) -> Iterator[HookContext[ArgsT]]:
        return iter([entry.context for entry in self.entries()])

    def __len__(self) -> int:
        return len(self.entries())

    def __repr__(self) -> str:
        cls = type(self)
        hooks = ",\n".join(f"{entry.position}: {entry.context!r}" for entry in self.entries())
        return (
            f"<{cls.__module__}.{cls.__qualname__}(\n  name={self.name}, \n  hooks=[\n"
            f"{textwrap.indent(hooks, '    ')}\n  ])>"
        )

    def _holds(self, other: HookContextChannel[ArgsT]) -> bool:
        return other is self or any(
            isinstance(registration.hook, HookContextChannel) and registration.hook._holds(other)
            for registration in self._registrations
        )

    def _remove(self, registration: _Registration[ArgsT]) -> None:
        if registration in self._registrations:
            self._registrations.remove(registration)
            if isinstance(registration.hook, HookContextChannel):
                registration.hook._parents.remove(self)
            self._changed()

    def _changed(self) -> None:
        self._plan = None
        for parent in self._parents:
            parent._changed()

    def _flatten(self) -> Iterator[tuple[HookContext[ArgsT], HookOwner | None]]:
        for registration in self._registrations:
            if isinstance(registration.hook, HookContextChannel):
                yield from registration.hook._flatten()
            else:
                yield registration.hook, self._owner

    def _build(self) -> Plan[ArgsT]:
        entries = tuple(
            HookEntry(position, context, *context.functions(), owner)
            for position, (context, owner) in enumerate(self._flatten())
        )
        to_run = entries
        for wrapper in self._all_wrappers():
            to_run = tuple(wrapper(to_run))
        self._plan = Plan(self.name, entries, to_run) if entries or to_run else EMPTY
        return self._plan

    def _all_wrappers(self) -> Iterator[EntryWrapper[ArgsT]]:
        yield from self._wrappers
        for registration in self._registrations:
            if isinstance(registration.hook, HookContextChannel):
                yield from registration.hook._all_wrappers()


class _Registration(Generic[ArgsT]):
    """Registration of a hook; a second registration after a removal is another object."""

    __slots__ = ("hook",)

    def __init__(self, hook: HookContext[ArgsT] | HookContextChannel[ArgsT]) -> None:
        self.hook = hook
