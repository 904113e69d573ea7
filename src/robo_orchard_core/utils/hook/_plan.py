"""What a channel runs, worked out ahead, and what happens when some of it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from operator import length_hint
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from robo_orchard_core.utils.hook._errors import add_origin, attach_later
from robo_orchard_core.utils.hook._function_info import FunctionInfo

if TYPE_CHECKING:
    from robo_orchard_core.utils.hook._context import HookContext

ArgsT = TypeVar("ArgsT")
HookFunction: TypeAlias = Callable[[ArgsT], Any]


class HookOwner(Protocol):
    """Whoever registers hooks in a channel, to be named in errors and descriptions."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class HookEntry(Generic[ArgsT]):
    """One hook of a channel, as it runs."""

    position: int
    """Its place in the order, from 0 (outermost)."""
    context: HookContext[ArgsT]
    before: HookFunction[ArgsT] | None
    after: HookFunction[ArgsT] | None
    owner: HookOwner | None
    """Who registered it, where that is known."""

    @property
    def label(self) -> str:
        """The name in errors: the hook's own, its owner's, or its class's."""
        if self.context.name is not None:
            return self.context.name
        return self.owner.name if self.owner is not None else type(self.context).__name__


class Plan(Generic[ArgsT]):
    """What a channel runs, worked out once for every change; never changed itself."""

    __slots__ = ("afters", "befores", "channel", "entries", "to_enter", "to_leave")

    def __init__(self, channel: str, entries: tuple[HookEntry[ArgsT], ...]) -> None:
        self.channel = channel
        self.entries = entries
        self.to_enter = tuple(entry for entry in entries if entry.before is not None)
        self.to_leave = tuple(entry for entry in reversed(entries) if entry.after is not None)
        self.befores = tuple(entry.before for entry in entries if entry.before is not None)
        self.afters = tuple(entry.after for entry in reversed(entries) if entry.after is not None)

    def failed_to_enter(
        self, args: ArgsT, error: BaseException, entering: Iterator[HookFunction[ArgsT]]
    ) -> None:
        """Leave the hooks ahead of the one whose ``before`` raised ``error``."""
        failed = self.to_enter[len(self.to_enter) - length_hint(entering) - 1]
        self._note_origin(error, failed, "before")
        entered = (entry for entry in self.to_leave if entry.position < failed.position)
        self.unwind(args, error, entered)

    def failed_to_leave(
        self, args: ArgsT, error: BaseException, leaving: Iterator[HookFunction[ArgsT]]
    ) -> None:
        """Leave the hooks outside the one whose ``after`` raised ``error``."""
        first_open = len(self.to_leave) - length_hint(leaving)
        self._note_origin(error, self.to_leave[first_open - 1], "after")
        self.unwind(args, error, self.to_leave[first_open:])

    def unwind(
        self, args: ArgsT, error: BaseException, to_leave: Iterable[HookEntry[ArgsT]]
    ) -> None:
        """Run the afters of ``to_leave`` with ``args.exception`` set, whatever they raise.

        Where ``args`` has a method ``failing``, it is told first, since the afters may take long.
        """
        before = getattr(args, "exception", None)
        _set_exception(args, error)
        if (tell := getattr(args, "failing", None)) is not None:
            with suppress(Exception):  # leaving goes on, whoever is told
                tell(error)
        for entry in to_leave:
            assert entry.after is not None
            try:
                entry.after(args)
            except BaseException as later:
                self._note_origin(later, entry, "after")
                attach_later(error, later)
        # An error leads to the arguments by its traceback. If they led back to it, what they hold
        # would live until the garbage collector came by.
        _set_exception(args, before)

    def _note_origin(self, error: BaseException, entry: HookEntry[ArgsT], role: str) -> None:
        function = FunctionInfo.of(entry.before if role == "before" else entry.after)  # type: ignore[arg-type]  # the one that ran
        add_origin(
            error,
            f"{entry.label!r} ({self.channel}, {role}): {function.kind} {function.name}"
            + (f" from {function.location}" if function.location else ""),
        )


def _set_exception(args: Any, error: BaseException | None) -> None:
    if hasattr(args, "exception"):
        with suppress(Exception):  # such as one that can't be set; leaving goes on without it
            args.exception = error


EMPTY: Plan[Any] = Plan("", ())


class Scope(AbstractContextManager[None], Generic[ArgsT]):
    """The plan around a ``with`` body."""

    __slots__ = ("_args", "_plan")

    def __init__(self, plan: Plan[ArgsT], args: ArgsT) -> None:
        self._plan = plan
        self._args = args

    def __enter__(self) -> None:
        entering = iter(self._plan.befores)
        try:
            for before in entering:
                before(self._args)
        except BaseException as error:
            self._plan.failed_to_enter(self._args, error, entering)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._plan.unwind(self._args, error, self._plan.to_leave)
            return
        leaving = iter(self._plan.afters)
        try:
            for after in leaving:
                after(self._args)
        except BaseException as failure:
            self._plan.failed_to_leave(self._args, failure, leaving)
            raise
