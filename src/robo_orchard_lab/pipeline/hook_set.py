"""PipelineHooks: a named bundle of hooks over the channels of a run, and its configuration.

Also here: :class:`TriggeredHook`, which runs a hook when its trigger is due, and the decorators
``@hooks.<channel>.before`` and ``@hooks.<channel>.after``.
"""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar, overload

import torch

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_core.utils.config.errors import did_you_mean
from robo_orchard_core.utils.hook import (
    HookContext,
    HookContextChannel,
    HookEntry,
    HookRegistrationError,
    RemovableHandle,
    add_origin,
)
from robo_orchard_lab.foreign_fields import Form, foreign_remedy
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import StateError, UnknownHookError
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.trigger import Role, Trigger, as_trigger

HookFunction = Callable[[PipelineHookArgs], Any]
FunctionT = TypeVar("FunctionT", bound=Callable[[PipelineHookArgs], Any])


class TriggeredHook(HookContext[PipelineHookArgs]):
    """Hook with a trigger.

    A hook with a ``before`` evaluates the trigger there, once; its ``after`` runs if and only if
    the ``before`` ran. A hook without one evaluates the trigger in its ``after``.
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
        self._before = before and self._if_due(before)
        self._after = after and (self._if_due(after) if before is None else self._if_entered(after))

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

    def _if_due(self, function: HookFunction) -> HookFunction:
        due = self._due

        @functools.wraps(function)  # errors show the name and line of the function
        def run(args: PipelineHookArgs) -> None:
            if due(args):
                function(args)
                self._entered = True

        return run

    def _if_entered(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)
        def run(args: PipelineHookArgs) -> None:
            if self._entered:
                self._entered = False
                function(args)

        return run


class HookDecorator:
    """Decorator to register a function as a ``before`` or ``after``; returns the function.

    Use it bare, or with a trigger and a name for errors.

    Raises:
        HookRegistrationError: it is used on a class, or a trigger is passed without ``when=``.
    """

    def __init__(self, hooks: PipelineHooks | None, channel: ChannelName, role: Role) -> None:
        self._hooks, self._channel, self._role = hooks, channel, role

    @overload
    def __call__(self, function: FunctionT, /) -> FunctionT: ...
    @overload
    def __call__(
        self, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Callable[[FunctionT], FunctionT]: ...
    def __call__(
        self, function: Any = None, *, when: Trigger | str | None = None, name: str | None = None
    ) -> Any:
        hooks, channel, role = self._hooks, self._channel, self._role
        if hooks is None:
            raise HookRegistrationError(
                f"{channel}.{role} needs an instance; write @hooks.{channel}.{role}, or in the "
                f"constructor of a class self.register_hook({channel!r}, ...)"
            )
        if isinstance(function, str | Trigger):
            raise HookRegistrationError(f"write @hooks.{channel}.{role}(when={str(function)!r})")

        def register(function: FunctionT) -> FunctionT:
            before, after = (function, None) if role == "before" else (None, function)
            hook = HookContext.from_callable(before, after, name)
            hooks.register_hook(channel, hook, when)
            return function

        return register if function is None else register(function)


class ChannelDecorators:
    """Decorators of a channel, as an attribute of :class:`PipelineHooks`.

    >>> from robo_orchard_lab.pipeline import PipelineHooks
    >>> hooks = PipelineHooks("notes")
    >>> @hooks.on_step.after(when="100 steps")
    ... def note(args: PipelineHookArgs) -> None:
    ...     print("step", args.global_step_id)
    """

    def __init__(self, channel: ChannelName, hooks: PipelineHooks | None = None) -> None:
        self._channel = channel
        self.before = HookDecorator(hooks, channel, "before")
        """Register a function to run before the body of the channel."""
        self.after = HookDecorator(hooks, channel, "after")
        """Register a function to run after the body of the channel."""

    def __get__(self, hooks: PipelineHooks | None, cls: type | None = None) -> ChannelDecorators:
        return self if hooks is None else ChannelDecorators(self._channel, hooks)


class PipelineHooks:
    """Named bundle of hooks, to subclass or to decorate functions with.

    A subclass registers its methods in the constructor. A channel is a stage of the loop:
    ``before`` runs when it starts, ``after`` when it ends.

    >>> class Greeter(PipelineHooks):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.register_hook("on_epoch", HookContext.from_callable(before=self.greet))
    ...
    ...     def greet(self, args: PipelineHookArgs) -> None:
    ...         print("epoch", args.epoch_id)

    A function needs a decorator, optionally with a trigger:

    >>> notes = PipelineHooks("notes")
    >>> @notes.on_epoch.after
    ... def note(args: PipelineHookArgs) -> None:
    ...     print("epoch done")
    >>> @notes.on_step.after(when="100 steps")
    ... def log_loss(args: PipelineHookArgs) -> None:
    ...     print(args.loss)

    Pass bundles to ``HookBasedTrainer(hooks=[...])``, or run one channel to try them:

    >>> hooks = PipelineHooks.from_hooks([Greeter(), notes])
    >>> with hooks.begin("on_epoch", PipelineHookArgs()):
    ...     print("training")
    epoch 0
    training
    epoch done

    Bundles may contain bundles. Each ``before`` runs in registration order, each ``after`` in
    reverse. A hook with state overrides :meth:`state_dict` and :meth:`load_state_dict`, and
    :meth:`redistribute_states` if the state differs between ranks.
    """

    __module__ = "robo_orchard_lab.pipeline.hooks.mixin"  # the public import path, also in repr

    on_loop = ChannelDecorators("on_loop")
    on_epoch = ChannelDecorators("on_epoch")
    on_step = ChannelDecorators("on_step")
    on_batch = ChannelDecorators("on_batch")
    on_model_forward = ChannelDecorators("on_model_forward")
    on_model_backward = ChannelDecorators("on_model_backward")
    on_optimizer_step = ChannelDecorators("on_optimizer_step")
    on_evaluation = ChannelDecorators("on_evaluation")

    keeps_trajectory: ClassVar[bool] = False
    """True if no setting of the hook changes the weights after any step. A run may then resume with
    other settings. The hook may still end the run."""

    published_metrics: Sequence[str] | None = None
    """Names of the metrics that the hook publishes, or patterns such as ``"rollout/*"``; None if
    unknown. If all hooks declare theirs, an unknown name of a metric to monitor or to show is an
    error before the first step. A subclass declares its own."""

    reads: Sequence[str] | None = None
    """What the hook reads, for the plan of a run: names of data fields of `PipelineHookArgs`, such
    as ``loss``, or of docs/how_to/hooks.md, such as ``gradients``; None if not declared."""
    changes: Sequence[str] | None = None
    """What the hook changes: names of assignable fields, or of docs/how_to/hooks.md, such as
    ``model.weights`` or ``metrics``; None if not declared."""
    requests: Sequence[str] | None = None
    """Methods of ``args.requests`` that the hook calls, such as ``stop``; None if not declared."""

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
        """Name in errors and saved states, unique in a trainer; default: the class name."""
        return self._hook_name if self._hook_name is not None else type(self).__name__

    @name.setter
    def name(self, name: str) -> None:
        self._hook_name = name

    def declare_effects(
        self,
        *,
        reads: Sequence[str] = (),
        changes: Sequence[str] = (),
        requests: Sequence[str] = (),
    ) -> None:
        """Add names to :attr:`reads`, :attr:`changes` and :attr:`requests` of this object.

        For a bundle of functions, and in constructors, for effects that depend on settings:

        >>> notes = PipelineHooks("notes")
        >>> notes.declare_effects(reads=["loss"])
        >>> notes.reads, notes.requests
        (('loss',), ())
        """
        added = {"reads": reads, "changes": changes, "requests": requests}
        for effect, names in added.items():
            known = getattr(self, effect)
            declared = known if isinstance(known, tuple | list) else ()
            more = [names] if isinstance(names, str) else names
            setattr(self, effect, tuple(dict.fromkeys((*declared, *more))))

    def get_channel(self, name: ChannelName) -> HookContextChannel[PipelineHookArgs]:
        """Return the hooks of a channel.

        Raises:
            HookRegistrationError: the channel does not exist, or the constructor of the subclass
                did not call ``super().__init__()``.
        """
        if self._hook_channels is None:
            raise HookRegistrationError(
                f"{type(self).__qualname__}.__init__ must call super().__init__() first"
            )
        if name not in self._hook_channels:
            near = did_you_mean(str(name), CHANNEL_NAMES)
            raise HookRegistrationError(
                f"no channel {name!r}{f'; {near}' if near else '.'} "
                f"Channels: {', '.join(CHANNEL_NAMES)}"
            )
        return self._hook_channels[name]

    def register_hook(
        self,
        channel: ChannelName,
        hook: HookContext[PipelineHookArgs],
        when: Trigger | str | None = None,
    ) -> RemovableHandle:
        """Add a hook to a channel, nested inside the registered hooks.

        Takes effect the next time the channel is entered, also in a running trainer.

        Args:
            channel: name of the channel.
            hook: hook to run around the body of the channel.
            when: trigger or its text; None runs the hook every time.

        Raises:
            HookRegistrationError: the channel does not exist, or the object is not a hook or is
                already registered.
            HookSignatureError: before or after can't be called with one argument.
            TriggerError: the text can't be parsed, or the trigger is never due on this channel.
        """
        registered = self.get_channel(channel)
        if when is not None:
            if not isinstance(hook, HookContext):
                raise HookRegistrationError(
                    f"{channel} needs a HookContext with a trigger, got {type(hook).__name__}; "
                    "make one with HookContext.from_callable(before=..., after=...)"
                )
            hook = TriggeredHook(hook, as_trigger(when), channel)
        return registered.register(hook)

    def register_for_loop(self, begin: Callable[[PipelineHookArgs], RemovableHandle]) -> None:
        """Call a function when the loop begins, and remove its handle when the loop ends."""
        handles: list[RemovableHandle] = []

        @functools.wraps(begin)  # errors show the name and line of the function
        def before(args: PipelineHookArgs) -> None:
            handles.append(begin(args))

        @functools.wraps(begin)
        def after(args: PipelineHookArgs) -> None:
            handles.pop().remove()

        self.register_hook("on_loop", HookContext.from_callable(before, after))

    def register_at_commit(self, request: HookFunction, when: Trigger | str) -> RemovableHandle:
        """Call a function before each commit point with a due trigger, to make requests.

        The call happens in the ``after`` of the channel that knows exactly: ``on_step`` for steps,
        ``on_optimizer_step`` for committed updates, ``on_epoch`` for epochs and the end of the
        run; once for each due part of the trigger.

        Raises:
            TriggerError: the text can't be parsed.
        """
        handles = [
            self.register_hook(channel, HookContext.from_callable(after=request), part)
            for channel, part in as_trigger(when).by_commit_channel().items()
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return RemovableHandle(remove)

    def register_pipeline_hooks(self, hooks: HookLike) -> RemovableHandle:
        """Add a bundle with all its hooks, or build and add the bundle of a configuration.

        Raises:
            HookRegistrationError: the object is not a bundle, or its name is in use.
        """
        self.get_channel("on_loop")  # raises if super().__init__() was not called
        bundle = _build(hooks)
        bundle.get_channel("on_loop")
        if any(bundle is known for known in (self, *self.all_hooks())):
            raise HookRegistrationError(f"hook {bundle.name!r} is already registered here")
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
        """Return one bundle of bundles and configurations; keys of a mapping become hook names."""
        bundle = PipelineHooks()
        if hooks is None:
            return bundle
        if isinstance(hooks, Mapping):
            for name, hook in hooks.items():
                named = _build(hook)
                named.name = name
                bundle += named
            return bundle
        if isinstance(hooks, PipelineHooks | PipelineHooksConfig | type):
            hooks = [hooks]
        for hook in hooks:
            bundle += hook
        return bundle

    def begin(
        self, channel: ChannelName, args: PipelineHookArgs
    ) -> AbstractContextManager[PipelineHookArgs]:
        """Return a context manager for the hooks of a channel; yields ``args``."""
        return self.get_channel(channel).begin(args)

    def unregister_all(self) -> None:
        """Remove all hooks and bundles.

        On a trainer's hooks this includes the hook that updates the weights.
        """
        for name in CHANNEL_NAMES:
            self.get_channel(name).unregister_all()
        self._hook_members = ()

    def __getitem__(self, name: str) -> PipelineHooks:
        """Return the nested bundle of this name, at any depth; ``name in hooks`` tests for it.

        Raises:
            UnknownHookError: no bundle has the name; the message has the similar one, or all.
            TypeError: the name is not a string.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"hooks are found by name, such as hooks['EMA']; got {name!r:.60}. To iterate, use "
                "hooks.named_hooks()"
            )
        known = {bundle.name: bundle for bundle in self.named_hooks() if bundle is not self}
        if name not in known:
            raise UnknownHookError(name, known)
        return known[name]

    def __contains__(self, name: object) -> bool:
        return any(b.name == name for b in self.named_hooks() if b is not self)

    def all_hooks(self) -> Iterator[PipelineHooks]:
        """Iterate over all nested bundles, at any depth, in registration order."""
        for member in self._hook_members:
            yield member
            yield from member.all_hooks()

    def named_hooks(self) -> Iterator[PipelineHooks]:
        """Iterate over this bundle and all nested bundles, except unnamed ``PipelineHooks()``."""
        return (
            bundle
            for bundle in (self, *self.all_hooks())
            if bundle._hook_name is not None or type(bundle) is not PipelineHooks
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the bundles inside, by name.

        A subclass with state overrides this, and returns only its own state: plain values, tensors,
        lists and dicts. Bundles inside it are saved separately.

        Each rank gets back its own tensors. A sharded tensor is loaded with the sharding of the
        parameter whose name occurs in its key, if the shapes are equal, and else unsharded.
        """
        state = {}
        for bundle in self._stateful():
            try:
                state[bundle.name] = bundle.state_dict()
            except Exception as error:
                add_origin(error, f"{bundle.name!r} (state_dict)")
                raise
        return state

    def check_state(self, state: Any, model: torch.nn.Module) -> None:
        """Raise a ``StateError`` if :meth:`load_state_dict` can't load the state of this bundle.

        A subclass overrides it for checks beyond its :attr:`state_schema`; nothing may change.
        """
        # The schema belongs to the state of its class, not to that of a subclass.
        cls = next(cls for cls in type(self).__mro__ if "state_dict" in vars(cls))
        if (schema := vars(cls).get("state_schema")) is not None:
            schema.check(state, self.name)

    def check_states(self, state: Mapping[str, Any], model: torch.nn.Module) -> None:
        """Check the states of all bundles inside before any of them is loaded.

        Args:
            state: result of :meth:`state_dict`.
            model: plain model of the run.

        Raises:
            StateError: a state does not fit, or bundles differ from the saved ones.
        """
        for name, bundle in self._bundles_of(state).items():
            bundle.check_state(state[name], model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Raises:
            StateError: the names in ``state`` are not the names of the registered bundles with
                state; nothing is loaded then.
        """
        for name, bundle in self._bundles_of(state).items():
            try:
                bundle.load_state_dict(state[name])
            except Exception as error:
                add_origin(error, f"{name!r} (load_state_dict)")
                raise

    def _bundles_of(self, state: Mapping[str, Any]) -> dict[str, PipelineHooks]:
        bundles = {bundle.name: bundle for bundle in self._stateful()}
        missing = sorted(set(bundles) - set(state))
        unexpected = sorted(set(state) - set(bundles))
        if missing or unexpected:
            raise StateError(
                "the saved hook states belong to other hooks: "
                f"registered but not saved: {', '.join(missing) or 'none'}; "
                f"saved but not registered: {', '.join(unexpected) or 'none'}"
            )
        return bundles

    def undeclared_publishers(self) -> list[str]:
        """Return the names of hooks inside that may publish metrics that no hook declares.

        These are the hooks of other packages without :attr:`published_metrics` of their own.
        """
        found = dict[str, None]()
        for channel in CHANNEL_NAMES:
            for entry in self.get_channel(channel).entries():
                owner, functions = entry.owner, (entry.before, entry.after)
                code = [type(owner), *(getattr(f, "func", f) for f in functions if f is not None)]
                modules = [str(getattr(part, "__module__", "")) for part in code]
                is_ours = all(module.startswith("robo_orchard_lab.") for module in modules)
                names = [vars(part).get("published_metrics") for part in (owner, type(owner))]
                if not is_ours and names == [None, None]:
                    found[entry.label] = None
        return list(found)

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], world_size: int
    ) -> Sequence[Mapping[str, Any]]:
        """Return one state per rank of a different world size.

        By default each rank gets the state of its index, and additional ranks get the last one:
        correct for a state that is equal on all ranks. Override it for a state of which each rank
        has a share, such as a sum. Called on every rank before :meth:`load_state_dict`; ``states``
        must not be changed.

        Args:
            states: states of the ranks that saved, in rank order.
            world_size: number of states to return.

        Raises:
            StateError: the states can't be redistributed.
        """
        return [states[min(rank, len(states) - 1)] for rank in range(world_size)]

    def rank_consistency_info(self) -> Any:
        """Return plain values to compare between ranks, in addition to the configuration.

        The run fails at its start if ranks differ.
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
    """Configuration of a bundle of hooks; calling it builds the bundle.

    ``class_type`` names the class, ``PipelineHooksConfig[MyHook]`` declares its type.
    """

    @classmethod
    def remedy_for(cls, name: str, value: Any, form: Form) -> str:
        return foreign_remedy("hook", name, value, form)


def for_optimizers(names: Collection[str] | None, hook: HookFunction) -> HookFunction:
    """Return a hook function for the entries of named optimizers only; None keeps the function."""
    if names is None:
        return hook

    @functools.wraps(hook)
    def run(args: PipelineHookArgs) -> None:
        if args.optimizer_name in names:
            hook(args)

    return run


HookLike: TypeAlias = "PipelineHooks | PipelineHooksConfig[PipelineHooks]"
"""Bundle of hooks, or a configuration that builds one."""


def hook_name(entry: HookEntry[PipelineHookArgs]) -> str:
    """Return the name of an entry's hook; without one, that of the entry."""
    owner = entry.owner
    is_unnamed = type(owner) is PipelineHooks and owner.name == PipelineHooks.__name__
    return entry.label if owner is None or is_unnamed else owner.name


def check_unique_names(bundles: Iterable[PipelineHooks]) -> None:
    """Raise `HookRegistrationError` if two bundles have the same name."""
    taken = [name for name, count in Counter(b.name for b in bundles).items() if count > 1]
    if taken:
        raise HookRegistrationError(
            f"two hooks have one name: {', '.join(map(repr, taken))}; saved states need unique "
            "names, so set hook.name = '...' or pass hooks={'name': hook, ...}"
        )


def _build(hooks: HookLike) -> PipelineHooks:
    bundle: Any = hooks() if isinstance(hooks, PipelineHooksConfig) else hooks
    if not isinstance(bundle, PipelineHooks):
        found = type(bundle).__name__
        remedy = "register a HookContext by register_hook(channel, hook)"
        if isinstance(bundle, type):
            found, remedy = f"type {bundle.__name__}", f"pass an instance, {bundle.__name__}(...)"
        raise HookRegistrationError(
            f"hooks: expected a PipelineHooks or a PipelineHooksConfig, got {found}; {remedy}"
        )
    return bundle
