"""A named bundle of hooks over the channels of a run, and its configuration."""

from __future__ import annotations

import difflib
import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar, overload

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_core.utils.hook import (
    HookContext,
    HookContextChannel,
    HookRegistrationError,
    RemovableHandle,
    add_origin,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.trigger import Role, Trigger, as_trigger

# --- scheduled hook --------------------------------------------------------------------------
# A hook that runs when its trigger is due.


HookFunction = Callable[[PipelineHookArgs], Any]


class TriggeredHook(HookContext[PipelineHookArgs]):
    """Another hook, run when a trigger is due.

    A hook with a ``before`` asks there, once: its ``after`` runs if, and only if, the ``before``
    did. One without asks in its ``after``.

    Raises:
        TriggerError: the trigger can never be due on this channel.
    """

    def __init__(
        self, hook: HookContext[PipelineHookArgs], when: Trigger, channel: ChannelName
    ) -> None:
        self.hook = hook
        self.when = when
        self.name = hook.name
        before, after = hook.functions()
        self._due = when.bind(channel, "after" if before is None else "before")
        self._entered = False
        self._before = before and self._asking(before)
        self._after = after and (self._asking(after) if before is None else self._if_entered(after))

    def before(self, args: PipelineHookArgs) -> None:
        if self._before is not None:
            self._before(args)

    def after(self, args: PipelineHookArgs) -> None:
        if self._after is not None:
            self._after(args)

    def functions(self) -> tuple[HookFunction | None, HookFunction | None]:
        return self._before, self._after

    def __repr__(self) -> str:
        return f"{self.hook!r} when {self.when}"

    def _asking(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)  # by which errors find its name and line
        def ask(args: PipelineHookArgs) -> None:
            self._entered = self._due(args)
            if self._entered:
                function(args)

        return ask

    def _if_entered(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)
        def after(args: PipelineHookArgs) -> None:
            if self._entered:
                function(args)

        return after


# --- channel decorators ----------------------------------------------------------------------
# Decorators that register functions on the channels of a bundle of hooks.


FunctionT = TypeVar("FunctionT", bound=Callable[[PipelineHookArgs], Any])


class _Registrar(Protocol):
    def register_hook(
        self,
        channel: ChannelName,
        hook: HookContext[PipelineHookArgs],
        when: Trigger | str | None = None,
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
        self, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Callable[[FunctionT], FunctionT]: ...
    def before(
        self, function: Any = None, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Any:
        """Run the function ahead of the channel's body: always, or by a trigger.

        Used as ``@hooks.on_step.before`` or with arguments; the function stays what it is.

        Raises:
            HookRegistrationError: it is used on a class, or a trigger is given without ``when=``.
        """
        return self._decorate("before", function, when, name)

    @overload
    def after(self, function: FunctionT, /) -> FunctionT: ...
    @overload
    def after(
        self, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Callable[[FunctionT], FunctionT]: ...
    def after(
        self, function: Any = None, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Any:
        """Run the function when the channel's body is over; else as :meth:`before`."""
        return self._decorate("after", function, when, name)

    def _decorate(
        self, role: Role, function: Any, when: Trigger | str | None, name: str | None
    ) -> Any:
        hooks, channel = self._hooks, self._channel
        if hooks is None:
            raise HookRegistrationError(
                f"{channel}.{role} registers a function in one bundle: use it on an instance, "
                f"@hooks.{channel}.{role}; a class registers its methods in its constructor, by "
                "self.register_hook"
            )
        if isinstance(function, str | Trigger):
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


class PipelineHooks:
    """Hooks for any number of channels that belong together, with a name and a state.

    A subclass registers its methods in its constructor:

    >>> class Greeter(PipelineHooks):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.register_hook("on_epoch", HookContext.from_callable(before=self.greet))
    ...
    ...     def greet(self, args: PipelineHookArgs) -> None:
    ...         print("epoch", args.epoch_id)
    >>> hooks = PipelineHooks.from_hooks([Greeter()])
    >>> with hooks.begin("on_epoch", PipelineHookArgs()):
    ...     pass
    epoch 0

    Bundles can be registered in one another; all hooks of a channel run in the order of their
    registration. One that carries state overrides :meth:`state_dict` and :meth:`load_state_dict`,
    and :meth:`redistribute_states` where that differs from rank to rank.
    """

    __module__ = "robo_orchard_lab.pipeline.hooks.mixin"  # the name to import it by, and printed

    on_loop = ChannelDecorators.of("on_loop")
    on_epoch = ChannelDecorators.of("on_epoch")
    on_step = ChannelDecorators.of("on_step")
    on_batch = ChannelDecorators.of("on_batch")
    on_model_forward = ChannelDecorators.of("on_model_forward")
    on_model_backward = ChannelDecorators.of("on_model_backward")
    on_optimizer_step = ChannelDecorators.of("on_optimizer_step")
    on_evaluation = ChannelDecorators.of("on_evaluation")

    keeps_trajectory: ClassVar[bool] = False
    """Whether the weights after each step are what they would be without it, however it is set, so
    that a run may go on with other settings of it; it may end the run."""

    _hook_channels: dict[ChannelName, HookContextChannel[PipelineHookArgs]] | None = None
    _hook_name: str | None = None
    _hook_members: tuple[PipelineHooks, ...] = ()

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            self._hook_name = name
        self._hook_channels = {
            channel: HookContextChannel(channel, owner=self) for channel in CHANNEL_NAMES
        }

    @property
    def name(self) -> str:
        """The name in errors and saved states, unique in a trainer; by default the class's."""
        return self._hook_name if self._hook_name is not None else type(self).__name__

    @name.setter
    def name(self, name: str) -> None:
        self._hook_name = name

    def get_channel(self, name: ChannelName) -> HookContextChannel[PipelineHookArgs]:
        """The hooks of one channel.

        Raises:
            HookRegistrationError: there is no such channel, or the subclass's constructor has not
                called ``super().__init__()``.
        """
        if self._hook_channels is None:
            cls = type(self).__qualname__
            raise HookRegistrationError(
                f"{cls}.__init__ must call super().__init__() before anything else is done with it"
            )
        if name not in self._hook_channels:
            near = difflib.get_close_matches(str(name), CHANNEL_NAMES, n=1)
            raise HookRegistrationError(
                f"there is no channel {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" The channels are {', '.join(CHANNEL_NAMES)}"
            )
        return self._hook_channels[name]

    def register_hook(
        self,
        channel: ChannelName,
        hook: HookContext[PipelineHookArgs],
        when: Trigger | str | None = None,
    ) -> RemovableHandle:
        """Add a hook to a channel, inside those that are there.

        It takes effect the next time the channel is entered, also in a running trainer.

        Args:
            channel: its name.
            hook: runs around what the channel is around.
            when: the trigger by which it runs, or its text; None for always.

        Raises:
            HookRegistrationError: a wrong channel, the same hook twice, or something that is no
                hook; the message says what to do.
            HookSignatureError: its before or after can't be called with one argument.
            TriggerError: the text can't be read, or is never due on this channel.
        """
        registered = self.get_channel(channel)
        if when is not None:
            if not isinstance(hook, HookContext):
                raise HookRegistrationError(
                    f"{channel} takes a HookContext with a trigger, got {type(hook).__name__}; "
                    "make one with HookContext.from_callable(before=..., after=...)"
                )
            hook = TriggeredHook(hook, as_trigger(when), channel)
        return registered.register(hook)

    def register_at_commit(
        self, ask: Callable[[PipelineHookArgs], Any], when: Trigger | str
    ) -> RemovableHandle:
        """Call ``ask`` ahead of each commit point at which a trigger is due, to make requests.

        It is called in the ``after`` of the channel that exactly knows: of ``on_step`` for steps,
        ``on_optimizer_step`` for committed updates, ``on_epoch`` for epochs and the end of the
        run. Where two of these meet, it is called in each; requests that are made twice are
        carried out once.

        Raises:
            TriggerError: the text can't be read.
        """
        handles = [
            self.register_hook(channel, HookContext.from_callable(after=ask), part)
            for channel, part in as_trigger(when).by_commit_channel().items()
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return RemovableHandle(remove)

    def register_pipeline_hooks(self, hooks: HookLike) -> RemovableHandle:
        """Add a bundle, or the one that a configuration describes, with all its hooks.

        Raises:
            HookRegistrationError: it has a name that is taken here, or is no bundle.
        """
        self.get_channel("on_loop")  # an error here if a constructor did not call ours
        bundle = _build(hooks)
        bundle.get_channel("on_loop")
        if any(bundle is known for known in (self, *self.all_hooks())):
            raise HookRegistrationError(f"hook {bundle.name!r} is registered here already")
        check_unique_names([*self.named_hooks(), *bundle.named_hooks()])
        handles = [
            self.get_channel(name).register(bundle.get_channel(name)) for name in CHANNEL_NAMES
        ]
        self._hook_members = (*self._hook_members, bundle)

        def remove() -> None:
            for handle in handles:
                handle.remove()
            # By identity: users may define equality on their hooks.
            self._hook_members = tuple(m for m in self._hook_members if m is not bundle)

        return RemovableHandle(remove)

    def __iadd__(self, hooks: HookLike) -> Self:
        self.register_pipeline_hooks(hooks)
        return self

    @classmethod
    def from_hooks(
        cls, hooks: HookLike | Iterable[HookLike] | Mapping[str, HookLike] | None
    ) -> PipelineHooks:
        """One bundle of several bundles and configurations, mixed as they come.

        The keys of a mapping become the names of its hooks.
        """
        bundle = PipelineHooks()
        if hooks is None:
            return bundle
        if isinstance(hooks, Mapping):
            for name, hook in hooks.items():
                named = _build(hook)
                named.name = name
                bundle += named
            return bundle
        for hook in [hooks] if isinstance(hooks, PipelineHooks | PipelineHooksConfig) else hooks:
            bundle += hook
        return bundle

    def begin(self, channel: ChannelName, args: PipelineHookArgs) -> AbstractContextManager[None]:
        """The hooks of a channel around the body of a ``with`` statement."""
        return self.get_channel(channel).begin(args)

    def unregister_all(self) -> None:
        """Remove every hook and every bundle; their handles become void.

        In a trainer's hooks, that includes the one that updates the weights.
        """
        for name in CHANNEL_NAMES:
            self.get_channel(name).unregister_all()
        self._hook_members = ()

    def all_hooks(self) -> Iterator[PipelineHooks]:
        """Every bundle registered here, and in those, in the order of registration."""
        for member in self._hook_members:
            yield member
            yield from member.all_hooks()

    def named_hooks(self) -> Iterator[PipelineHooks]:
        """This bundle and all in it that have an identity.

        A plain ``PipelineHooks()`` without a name has none: it only holds others together.
        """
        return (
            bundle
            for bundle in (self, *self.all_hooks())
            if bundle._hook_name is not None or type(bundle) is not PipelineHooks
        )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs, of plain values, tensors, lists and dicts.

        This one holds the states of the bundles registered here, by name. A subclass that has a
        state of its own returns that instead; the bundles in it are saved beside it.

        Each rank gets back its own tensors as they were. One that is divided among the ranks comes
        back divided as the parameter whose name its place in the state has in it, if it has its
        shape, and else whole; where the model is not sharded, it always comes back whole.
        """
        state = {}
        for bundle in self._stateful():
            try:
                state[bundle.name] = bundle.state_dict()
            except Exception as error:
                add_origin(error, f"{bundle.name!r} (state_dict)")
                raise
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` gave.

        Raises:
            StateError: a name in ``state`` is not registered here, or a registered bundle that
                has a state is not in it; nothing is loaded then.
        """
        bundles = {bundle.name: bundle for bundle in self._stateful()}
        missing = sorted(set(bundles) - set(state))
        unexpected = sorted(set(state) - set(bundles))
        if missing or unexpected:
            raise StateError(
                "the saved hook states are those of other hooks: "
                f"registered but not saved: {', '.join(missing) or 'none'}; "
                f"saved but not registered: {', '.join(unexpected) or 'none'}"
            )
        for name, bundle in bundles.items():
            try:
                bundle.load_state_dict(state[name])
            except Exception as error:
                add_origin(error, f"{name!r} (load_state_dict)")
                raise

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        """The states to go on from in another number of processes than they were saved by.

        By default each process gets that of its number, and those that are more get the last one:
        right for a state that is alike on all ranks. Override it where each rank has a part of a
        whole, such as a sum: then that of the whole has to come out again. It is called on every
        rank, ahead of :meth:`load_state_dict`, with all states, which are not to be changed.

        Args:
            states: of the ranks that saved, in their order.
            processes: how many states are wanted.

        Raises:
            StateError: it can't be done, as the message says.
        """
        return [states[min(rank, len(states) - 1)] for rank in range(processes)]

    def rank_consistency_info(self) -> Any:
        """What has to be the same on every rank, beside the configuration; by default nothing.

        Plain values, lists and dicts, which the ranks of a job compare when its run begins.
        """
        return None

    def _stateful(self) -> Iterator[PipelineHooks]:
        own = PipelineHooks.state_dict
        return (bundle for bundle in self.all_hooks() if type(bundle).state_dict is not own)

    def __repr__(self) -> str:
        cls = type(self)
        channels = "\n".join(
            f"{name}: {channel!r}, "
            for name in CHANNEL_NAMES
            if len(channel := self.get_channel(name))
        )
        return (
            f"<{cls.__module__}.{cls.__qualname__}(\n  hooks={{\n"
            f"{textwrap.indent(channels, '    ')}\n  }})>"
        )


HooksT_co = TypeVar("HooksT_co", bound=PipelineHooks, covariant=True)


class PipelineHooksConfig(ClassConfig[HooksT_co], Generic[HooksT_co]):
    """The parameters of a bundle of hooks; calling it builds the bundle.

    ``class_type`` names the class, ``PipelineHooksConfig[MyHook]`` declares its type.
    """


HookLike: TypeAlias = "PipelineHooks | PipelineHooksConfig[PipelineHooks]"
"""A bundle of hooks, or the configuration that builds one."""


def check_unique_names(bundles: Iterable[PipelineHooks]) -> None:
    """Refuse two bundles of one name.

    Raises:
        HookRegistrationError: with the names, and how to give others.
    """
    taken = [name for name, count in Counter(b.name for b in bundles).items() if count > 1]
    if taken:
        raise HookRegistrationError(
            f"two hooks have one name: {', '.join(map(repr, taken))}. A hook's state is saved by "
            "its name, so give one of them another, by hook.name = '...' or with "
            "hooks={'name': hook, ...}"
        )


def _build(hooks: HookLike) -> PipelineHooks:
    bundle = hooks() if isinstance(hooks, PipelineHooksConfig) else hooks
    if not isinstance(bundle, PipelineHooks):
        raise HookRegistrationError(
            "expected a PipelineHooks or a PipelineHooksConfig, "
            f"got {type(bundle).__name__}; register a HookContext by register_hook(channel, hook)"
        )
    return bundle
