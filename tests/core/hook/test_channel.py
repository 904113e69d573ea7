"""Registration, order and removal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from robo_orchard_core.utils.hook import (
    HookContext,
    HookContextChannel,
    HookContextFromCallable,
    HookRegistrationError,
    HookSignatureError,
    RemovableHandle,
    RemoveableHandle,
)

Trace = list[str]


def recording(name: str) -> HookContextFromCallable[Trace]:
    return HookContext.from_callable(
        before=lambda trace: trace.append(f"before {name}"),
        after=lambda trace: trace.append(f"after {name}"),
        name=name,
    )


def trace_of(channel: HookContextChannel[Trace]) -> Trace:
    trace: Trace = []
    channel.run(trace, lambda trace: trace.append("body"))
    return trace


def nested(names: list[str]) -> Trace:
    """The trace of hooks of these names, outermost first."""
    return [
        *(f"before {name}" for name in names),
        "body",
        *(f"after {name}" for name in reversed(names)),
    ]


def test_befores_run_in_order_and_afters_in_reverse() -> None:
    """The first registered hook is the outermost, and the body's value comes back."""
    channel = HookContextChannel[Trace]("on_step")
    for name in "abc":
        channel.register(recording(name))
    trace: Trace = []
    assert channel.run(trace, lambda trace: len(trace)) == 3
    assert trace == ["before a", "before b", "before c", "after c", "after b", "after a"]


def test_an_empty_channel_runs_the_body() -> None:
    """Without hooks only the body is left."""
    channel = HookContextChannel[Trace]("on_step")
    assert trace_of(channel) == ["body"]
    assert len(channel) == 0
    with channel.begin([]):
        pass


def test_one_sided_hooks_run_their_side() -> None:
    """A hook may have a before alone or an after alone."""
    trace: Trace = []
    channel = HookContextChannel[Trace]("on_step")
    channel.register(HookContext.from_callable(before=lambda t: t.append("in")))
    channel.register(HookContext.from_callable(after=lambda t: t.append("out")))
    with channel.begin(trace):
        trace.append("body")
    assert trace == ["in", "body", "out"]


def test_a_hook_is_registered_once() -> None:
    """The same hook twice in a channel is refused; after its removal it may come back."""
    channel = HookContextChannel[Trace]("on_step")
    hook = recording("a")
    handle = channel.register(hook)
    with pytest.raises(HookRegistrationError, match="registered in on_step already"):
        channel.register(hook)
    handle.remove()
    channel.register(hook)
    handle.remove()  # the old handle has nothing to do with the new registration
    assert trace_of(channel) == nested(["a"])


def test_what_is_no_hook_is_refused() -> None:
    """A bare function is refused with the way to make a hook of it."""
    channel = HookContextChannel[Trace]("on_step")
    with pytest.raises(HookRegistrationError, match=r"HookContext\.from_callable\(before"):
        channel.register(print)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("way", ["call", "remove", "with"])
def test_a_handle_can_be_used_again_and_in_every_way(way: str) -> None:
    """Used once or often, by call, by remove() or by with, a handle removes its hook once."""
    channel = HookContextChannel[Trace]("on_step")
    handle = channel.register(recording("a"))
    channel.register(recording("b"))
    for _ in range(3):
        if way == "call":
            handle()
        elif way == "remove":
            handle.remove()
        else:
            with handle as same:
                assert same is handle
        assert handle.removed
        assert trace_of(channel) == nested(["b"])


def test_a_handle_as_context_removes_on_error_too() -> None:
    """A hook that is registered for a with block is gone after it, also after an error."""
    channel = HookContextChannel[Trace]("on_step")

    def fail_while_registered() -> None:
        with channel.register(recording("a")):
            assert trace_of(channel) == nested(["a"])
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_registered()
    assert trace_of(channel) == ["body"]


def test_the_other_spelling_is_the_same_handle() -> None:
    """RemoveableHandle is RemovableHandle."""
    assert RemoveableHandle is RemovableHandle


def test_unregister_all_voids_handles() -> None:
    """After unregister_all, an old handle does not touch a hook that was registered anew."""
    channel = HookContextChannel[Trace]("on_step")
    hook = recording("a")
    handle = channel.register(hook)
    channel.unregister_all()
    assert trace_of(channel) == ["body"]
    channel.register(hook)
    handle()
    assert trace_of(channel) == nested(["a"])


def test_changes_take_effect_at_the_next_entry() -> None:
    """A hook that is added or removed while the channel is open does so at the next entry."""
    channel = HookContextChannel[Trace]("on_step")
    late = recording("late")
    handles: list[RemovableHandle] = []

    def swap(trace: Trace) -> None:
        if not handles:
            handles.append(channel.register(late))
            first.remove()

    first = channel.register(recording("first"))
    channel.register(HookContext.from_callable(before=swap))
    assert trace_of(channel) == nested(["first"])
    assert trace_of(channel) == nested(["late"])


def test_a_scope_that_is_open_is_left_as_it_was_entered() -> None:
    """A with block leaves the hooks it entered, whatever was registered or removed in it."""
    channel = HookContextChannel[Trace]("on_step")
    handle = channel.register(recording("a"))
    trace: Trace = []
    with channel.begin(trace):
        handle()
        channel.register(recording("b"))
    assert trace == ["before a", "after a"]


def test_a_channel_can_be_entered_while_it_is_open() -> None:
    """Nested entries of one channel keep their own hooks."""
    channel = HookContextChannel[Trace]("on_step")
    channel.register(recording("a"))
    trace: Trace = []
    with channel.begin(trace), channel.begin(trace):
        pass
    assert trace == ["before a", "before a", "after a", "after a"]


def test_channels_nest_in_place() -> None:
    """A channel registered in another runs there, in its place, and follows its changes."""
    inner = HookContextChannel[Trace]("on_step")
    outer = HookContextChannel[Trace]("on_step")
    outer.register(recording("a"))
    handle = outer.register(inner)
    outer.register(recording("c"))
    assert trace_of(outer) == nested(["a", "c"])
    inner.register(recording("b"))
    assert trace_of(outer) == nested(["a", "b", "c"])
    assert [entry.context.name for entry in outer.entries()] == ["a", "b", "c"]
    assert [hook.name for hook in outer] == ["a", "b", "c"]
    inner.unregister_all()
    assert trace_of(outer) == nested(["a", "c"])
    inner.register(recording("b"))
    handle.remove()
    assert trace_of(outer) == nested(["a", "c"])
    assert trace_of(inner) == nested(["b"])


def test_a_channel_cannot_hold_itself() -> None:
    """A cycle of channels is refused, direct or through others."""
    a, b = HookContextChannel[Trace]("on_step"), HookContextChannel[Trace]("on_step")
    with pytest.raises(HookRegistrationError, match="can't be registered in itself"):
        a.register(a)
    a.register(b)
    with pytest.raises(HookRegistrationError, match="can't be registered in itself"):
        b.register(a)


class Subclass(HookContext[Trace]):
    def before(self, args: Trace) -> None:
        args.append("before")

    def after(self, args: Trace) -> None:
        args.append("after")


class Aliased(HookContext[Trace]):
    """Written with the other names of the two methods."""

    def on_enter(self, args: Trace) -> None:
        args.append("before")

    def on_exit(self, args: Trace) -> None:
        args.append("after")


@pytest.mark.parametrize("cls", [Subclass, Aliased])
def test_both_pairs_of_names_can_be_defined_and_called(cls: type[HookContext[Trace]]) -> None:
    """before/after and on_enter/on_exit are the same two methods."""
    hook = cls()
    trace: Trace = []
    hook.before(trace)
    hook.on_exit(trace)
    hook.on_enter(trace)
    hook.after(trace)
    assert trace == ["before", "after"] * 2
    channel = HookContextChannel[Trace]("on_step")
    channel.register(hook)
    assert trace_of(channel) == ["before", "body", "after"]


class Calling(Aliased):
    def on_enter(self, args: Trace) -> None:
        args.append("own")
        super().on_enter(args)


class Overriding(Aliased):
    def before(self, args: Trace) -> None:
        args.append("own")
        super().before(args)  # type: ignore[safe-super]  # Aliased has it by its other name


class Mixin:
    def on_enter(self, args: Trace) -> None:
        args.append("before")

    def on_exit(self, args: Trace) -> None:
        args.append("after")


class Mixed(Mixin, HookContext[Trace]): ...


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Calling, ["own", "before"]),
        (Overriding, ["own", "before"]),
        (Mixed, ["before"]),
    ],
)
def test_the_names_agree_in_subclasses(cls: Any, expected: Trace) -> None:
    """Whichever name a subclass or a mixin defines, calls and super() reach the same methods."""
    hook = cls()
    for call in (hook.before, hook.on_enter):
        trace: Trace = []
        call(trace)
        assert trace == expected
    channel = HookContextChannel[Trace]("on_step")
    channel.register(hook)
    assert trace_of(channel) == [*expected, "body", "after"]


def test_a_hook_needs_both_methods() -> None:
    """A class that leaves one out is abstract."""

    class Half(HookContext[Trace]):
        def before(self, args: Trace) -> None: ...

    with pytest.raises(TypeError, match="after"):
        Half()  # type: ignore[abstract]  # what is tested


def test_a_hook_from_callables_can_be_called_by_hand() -> None:
    """Its methods call the callables, and do nothing where there is none."""
    trace: Trace = []
    only_before: HookContext[Trace] = HookContext.from_callable(before=lambda t: t.append("in"))
    only_before.before(trace)
    only_before.after(trace)
    only_after: HookContext[Trace] = HookContext.from_callable(after=lambda t: t.append("out"))
    only_after.on_enter(trace)
    only_after.on_exit(trace)
    assert trace == ["in", "out"]


async def coroutine(args: Any) -> None: ...


def generator(args: Any) -> Any:
    yield


async def async_generator(args: Any) -> Any:
    yield


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "can't be called with one argument: too many positional arguments"),
        (lambda a, b: None, "missing a required argument: 'b'"),
        (lambda *, a: None, "too many positional arguments"),
        (3, "must be callable with one argument .* got int"),
        (coroutine, "is a coroutine function, whose body would never run"),
        (generator, "is a generator function, whose body would never run"),
        (async_generator, "is a asynchronous generator function"),
    ],
)
def test_callables_that_cannot_serve_are_refused(function: Any, message: str) -> None:
    """A callable that takes another number of arguments, or would never run, is told where."""
    with pytest.raises(HookSignatureError, match=f"before.*{message}"):
        HookContext.from_callable(before=function)
    with pytest.raises(HookSignatureError, match=f"after.*{message}"):
        HookContext.from_callable(after=function)


def test_a_subclass_with_a_wrong_signature_is_refused() -> None:
    """The methods of a subclass are checked when it is registered."""

    class Wrong(HookContext[Trace]):
        def before(self) -> None: ...  # type: ignore[override]  # what is tested

        def after(self, args: Trace) -> None: ...

    with pytest.raises(HookSignatureError, match=r"before=.*Wrong\(id="):
        HookContextChannel[Trace]("on_step").register(Wrong())


@pytest.mark.parametrize("function", [lambda a, b=1: None, lambda *a: None, list.append, print])
def test_callables_that_take_one_argument_pass(function: Any) -> None:
    """Defaults, var-args and builtins that tell nothing are no reason to refuse."""
    if function is list.append:
        function = [].append
    HookContext.from_callable(before=function)


def test_a_hook_of_nothing_is_refused() -> None:
    """Neither before nor after is a mistake."""
    with pytest.raises(HookSignatureError, match="needs a before or an after"):
        HookContext.from_callable()


class ChannelMachine(RuleBasedStateMachine):
    """A channel against a list, under any sequence of registrations and removals."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = HookContextChannel[Trace]("on_step")
        self.names: list[str] = []
        self.handles: dict[str, RemovableHandle] = {}
        self.count = 0

    @rule()
    def register(self) -> None:
        name = str(self.count)
        self.count += 1
        self.handles[name] = self.channel.register(recording(name))
        self.names.append(name)

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), way=st.sampled_from(["call", "remove", "with"]))
    def remove(self, data: st.DataObject, way: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.handles)))
        handle = self.handles[name]
        if way == "call":
            handle()
        elif way == "remove":
            handle.remove()
        else:
            with handle:
                pass
        if name in self.names:
            self.names.remove(name)

    @rule()
    def clear(self) -> None:
        self.channel.unregister_all()
        self.names = []

    @invariant()
    def runs_what_the_list_says(self) -> None:
        assert trace_of(self.channel) == nested(self.names)


TestChannelAgainstAList = ChannelMachine.TestCase


@given(st.lists(st.booleans(), max_size=6))
def test_removing_restores(removed: list[bool]) -> None:
    """Removing any subset leaves the rest in their order."""
    channel = HookContextChannel[Trace]("on_step")
    handles = [channel.register(recording(str(i))) for i in range(len(removed))]
    for handle, remove in zip(handles, removed, strict=True):
        if remove:
            handle()
    assert trace_of(channel) == nested([str(i) for i, gone in enumerate(removed) if not gone])
