"""An ordered set of hooks around one kind of work."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from robo_orchard_core.utils.hook._context import HookContext, check_signature
from robo_orchard_core.utils.hook._errors import HookRegistrationError
from robo_orchard_core.utils.hook._handle import RemovableHandle
from robo_orchard_core.utils.hook._plan import EMPTY, ArgsT, HookEntry, HookOwner, Plan, Scope

ResultT = TypeVar("ResultT")


class HookContextChannel(Generic[ArgsT]):
    """Hooks that are entered in the order of their registration and left in reverse.

    ``run`` in short::

        for hook in hooks: hook.before(args)
        result = body(args)
        for hook in reversed(hooks): hook.after(args)
        return result

    If a ``before``, the body or an ``after`` raises, the ``after`` of every hook that was entered
    and not yet left still runs, with ``args.exception`` set to the error (where ``args`` has that
    attribute). The first error is the one that is raised, with a note that names the hook; those
    that follow are attached to it (:func:`later_errors`).

    A channel can be registered in another: its hooks run there, in its place. What is registered
    or removed while a channel is open takes effect the next time it is entered.
    """

    __module__ = "robo_orchard_core.utils.hook"  # the name to import it by, which printing shows

    __slots__ = ("_owner", "_parents", "_plan", "_registrations", "name")

    def __init__(self, name: str, owner: HookOwner | None = None) -> None:
        self.name = name
        self._owner = owner
        self._registrations: list[_Registration[ArgsT]] = []
        self._parents: list[HookContextChannel[ArgsT]] = []
        self._plan: Plan[ArgsT] | None = None  # None: to be built when next needed

    def register(self, hook: HookContext[ArgsT] | HookContextChannel[ArgsT]) -> RemovableHandle:
        """Add a hook, or another channel's hooks, as the innermost.

        Raises:
            HookRegistrationError: it is registered here already, or a channel would hold itself.
            HookSignatureError: its before or after can't be called with one argument.
        """
        if isinstance(hook, HookContextChannel):
            if hook._holds(self):
                raise HookRegistrationError(f"channel {self.name} can't be registered in itself")
        elif isinstance(hook, HookContext):
            for role, function in zip(("before", "after"), hook.functions(), strict=True):
                if function is not None:
                    check_signature(function, role)
        else:
            raise HookRegistrationError(
                f"{self.name} takes a HookContext, got {type(hook).__name__}; make one with "
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

    def unregister_all(self) -> None:
        """Remove every hook; their handles become void."""
        for registration in tuple(self._registrations):
            self._remove(registration)

    def run(self, args: ArgsT, body: Callable[[ArgsT], ResultT]) -> ResultT:
        """Call ``body(args)`` inside all hooks, and give what it returns."""
        plan = self._plan
        if plan is None:
            plan = self._build()
        if plan is EMPTY:
            return body(args)
        # The step path: plain loops over what was precomputed. Which hook failed is read off
        # the iterator afterwards, so that it costs nothing where none fails.
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
            plan.unwind(args, error, plan.to_leave)
            raise
        leaving = iter(plan.afters)
        try:
            for after in leaving:
                after(args)
        except BaseException as error:
            plan.failed_to_leave(args, error, leaving)
            raise
        return result

    def begin(self, args: ArgsT) -> AbstractContextManager[None]:
        """All hooks around the body of a ``with`` statement, as in :meth:`run`."""
        return Scope(self._plan or self._build(), args)

    def entries(self) -> tuple[HookEntry[ArgsT], ...]:
        """The hooks in the order in which they are entered, those of nested channels included."""
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
        self._plan = Plan(self.name, entries) if entries else EMPTY
        return self._plan


class _Registration(Generic[ArgsT]):
    """One act of registering; a hook that is removed and registered anew has another."""

    __slots__ = ("hook",)

    def __init__(self, hook: HookContext[ArgsT] | HookContextChannel[ArgsT]) -> None:
        self.hook = hook
