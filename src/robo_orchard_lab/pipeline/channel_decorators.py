"""Decorators that register functions on the channels of a bundle of hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from robo_orchard_core.utils.hook import HookContext, HookRegistrationError, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.schedule import Role, Schedule

FunctionT = TypeVar("FunctionT", bound=Callable[[PipelineHookArgs], Any])


class _Registrar(Protocol):
    def register_hook(
        self,
        channel: ChannelName,
        hook: HookContext[PipelineHookArgs],
        when: Schedule | str | None = None,
    ) -> RemovableHandle: ...


class ChannelDecorators:
    """Decorators that register functions on one channel of a bundle.

    >>> from robo_orchard_lab.pipeline import PipelineHooks
    >>> hooks = PipelineHooks("notes")
    >>> @hooks.on_step.after(when="100 steps")
    ... def note(args: PipelineHookArgs) -> None:
    ...     print("step", args.global_step_id)
    """

    def __init__(self, hooks: _Registrar | None, channel: ChannelName) -> None:
        self._hooks = hooks
        self._channel = channel

    @classmethod
    def of(cls, channel: ChannelName) -> _ChannelAttribute:
        """The attribute of a bundle that gives these decorators."""
        return _ChannelAttribute(channel)

    @overload
    def before(self, function: FunctionT, /) -> FunctionT: ...
    @overload
    def before(
        self, *, when: Schedule | str | None = None, name: str | None = None
    ) -> Callable[[FunctionT], FunctionT]: ...
    def before(
        self, function: Any = None, *, when: Schedule | str | None = None, name: str | None = None
    ) -> Any:
        """Run the function ahead of the channel's body: always, or by a schedule.

        Used as ``@hooks.on_step.before`` or with arguments; the function stays what it is.

        Raises:
            HookRegistrationError: it is used on a class, or a schedule is given without ``when=``.
        """
        return self._decorate("before", function, when, name)

    @overload
    def after(self, function: FunctionT, /) -> FunctionT: ...
    @overload
    def after(
        self, *, when: Schedule | str | None = None, name: str | None = None
    ) -> Callable[[FunctionT], FunctionT]: ...
    def after(
        self, function: Any = None, *, when: Schedule | str | None = None, name: str | None = None
    ) -> Any:
        """Run the function when the channel's body is over; else as :meth:`before`."""
        return self._decorate("after", function, when, name)

    def _decorate(
        self, role: Role, function: Any, when: Schedule | str | None, name: str | None
    ) -> Any:
        hooks, channel = self._hooks, self._channel
        if hooks is None:
            raise HookRegistrationError(
                f"{channel}.{role} registers a function in one bundle: use it on an instance, "
                f"@hooks.{channel}.{role}; a class registers its methods in its constructor, by "
                "self.register_hook"
            )
        if isinstance(function, str | Schedule):
            raise HookRegistrationError(f"write @hooks.{channel}.{role}(when={str(function)!r})")

        def register(function: FunctionT) -> FunctionT:
            before, after = (function, None) if role == "before" else (None, function)
            hook = HookContext.from_callable(before, after, name)
            hooks.register_hook(channel, hook, when)
            return function

        return register if function is None else register(function)


class _ChannelAttribute:
    def __init__(self, channel: ChannelName) -> None:
        self._channel = channel

    def __get__(self, hooks: _Registrar | None, cls: type | None = None) -> ChannelDecorators:
        return ChannelDecorators(hooks, self._channel)
