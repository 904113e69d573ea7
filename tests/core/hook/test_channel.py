"""Registration, order and removal of hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from robo_orchard_core.utils.hook import (
    HookContext,
    HookContextChannel,
    HookContextFromCallable,
    HookEntry,
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


def wrapped(channel: HookContextChannel[Trace], name: str) -> RemovableHandle:
    """Wrap a channel: note each function, and add an outermost and an innermost entry."""

    def noting(function: Any) -> Any:
        def run(trace: Trace) -> None:
            trace.append(f"{name}:")
            function(trace)

        return function and run

    def wrapper(entries: Any) -> Any:
        outer, inner = recording(f"outer {name}"), recording(f"inner {name}")
        yield HookEntry(-1, outer, *outer.functions(), None)
        for entry in entries:
            yield replace(entry, before=noting(entry.before), after=noting(entry.after))
        yield HookEntry(-1, inner, *inner.functions(), None)

    return channel.wrap(wrapper)


def nested(names: list[str]) -> Trace:
    """Return the trace of hooks with these names, outermost first."""
    return [
        *(f"before {name}" for name in names),
        "body",
        *(f"after {name}" for name in reversed(names)),
    ]


def test_befores_run_in_order_and_afters_in_reverse() -> None:
    """The first hook is the outermost, and the body's result is returned."""
    channel = HookContextChannel[Trace]("on_step")
    for name in "abc":
        channel.register(recording(name))
    trace: Trace = []
    assert channel.run(trace, lambda trace: len(trace)) == 3
    assert trace == ["before a", "before b", "before c", "after c", "after b", "after a"]


def test_empty_channel_runs_the_body() -> None:
    """Without hooks, only the body runs."""
    channel = HookContextChannel[Trace]("on_step")
    assert trace_of(channel) == ["body"]
    assert len(channel) == 0
    with channel.begin([]):
        pass


def test_hook_may_have_only_before_or_only_after() -> None:
    """A hook may have a before or an after alone."""
    trace: Trace = []
    channel = HookContextChannel[Trace]("on_step")
    channel.register(HookContext.from_callable(before=lambda t: t.append("in")))
    channel.register(HookContext.from_callable(after=lambda t: t.append("out")))
    with channel.begin(trace):
        trace.append("body")
    assert trace == ["in", "body", "out"]


def test_hook_can_be_registered_only_once() -> None:
    """A second registration is refused until the hook is removed."""
    channel = HookContextChannel[Trace]("on_step")
    hook = recording("a")
    handle = channel.register(hook)
    with pytest.raises(HookRegistrationError, match="registered in on_step already"):
        channel.register(hook)
    handle.remove()
    channel.register(hook)
    handle.remove()  # no effect on the new registration
    assert trace_of(channel) == nested(["a"])


def test_registration_refuses_plain_functions() -> None:
    """The error names HookContext.from_callable."""
    channel = HookContextChannel[Trace]("on_step")
    with pytest.raises(HookRegistrationError, match=r"HookContext\.from_callable\(before"):
        channel.register(print)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("way", ["call", "remove", "with"])
def test_handles_are_idempotent(way: str) -> None:
    """A call, remove() or a with block removes the hook once."""
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


def test_handle_as_context_removes_the_hook_on_errors() -> None:
    """A hook registered for a with block is removed after an error, too."""
    channel = HookContextChannel[Trace]("on_step")

    def fail_while_registered() -> None:
        with channel.register(recording("a")):
            assert trace_of(channel) == nested(["a"])
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_registered()
    assert trace_of(channel) == ["body"]


def test_removeable_handle_is_an_alias() -> None:
    """RemoveableHandle is RemovableHandle."""
    assert RemoveableHandle is RemovableHandle


def test_unregister_all_invalidates_handles() -> None:
    """An old handle does not remove a later registration of the hook."""
    channel = HookContextChannel[Trace]("on_step")
    hook = recording("a")
    handle = channel.register(hook)
    channel.unregister_all()
    assert trace_of(channel) == ["body"]
    channel.register(hook)
    handle()
    assert trace_of(channel) == nested(["a"])


def test_changes_take_effect_at_the_next_entry() -> None:
    """Registration and removal in an open channel apply to the next entry."""
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


def test_open_scope_exits_the_hooks_it_entered() -> None:
    """Changes inside a with block don't affect its exit."""
    channel = HookContextChannel[Trace]("on_step")
    handle = channel.register(recording("a"))
    trace: Trace = []
    with channel.begin(trace):
        handle()
        channel.register(recording("b"))
    assert trace == ["before a", "after a"]


def test_channel_is_reentrant() -> None:
    """Nested entries of one channel keep their own hooks."""
    channel = HookContextChannel[Trace]("on_step")
    channel.register(recording("a"))
    trace: Trace = []
    with channel.begin(trace), channel.begin(trace):
        pass
    assert trace == ["before a", "before a", "after a", "after a"]


def test_nested_channel_runs_at_its_position() -> None:
    """A nested channel runs at its position and follows changes."""
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


def test_channel_can_not_contain_itself() -> None:
    """Direct and indirect cycles are refused."""
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
    """Hook defined with the aliases of the two methods."""

    def on_enter(self, args: Trace) -> None:
        args.append("before")

    def on_exit(self, args: Trace) -> None:
        args.append("after")


@pytest.mark.parametrize("cls", [Subclass, Aliased])
def test_on_enter_and_on_exit_are_aliases(cls: type[HookContext[Trace]]) -> None:
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
def test_aliases_agree_in_subclasses(cls: Any, expected: Trace) -> None:
    """Calls and super() reach the same method under either name."""
    hook = cls()
    for call in (hook.before, hook.on_enter):
        trace: Trace = []
        call(trace)
        assert trace == expected
    channel = HookContextChannel[Trace]("on_step")
    channel.register(hook)
    assert trace_of(channel) == [*expected, "body", "after"]


def test_hook_class_needs_both_methods() -> None:
    """A class without one of the methods is abstract."""

    class Half(HookContext[Trace]):
        def before(self, args: Trace) -> None: ...

    with pytest.raises(TypeError, match="after"):
        Half()  # type: ignore[abstract]  # what is tested


def test_methods_of_a_hook_from_callables_can_be_called() -> None:
    """Methods call the callables, or do nothing."""
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
def test_invalid_callables_are_refused(function: Any, message: str) -> None:
    """Wrong signatures, coroutines and generators are refused with role and reason."""
    with pytest.raises(HookSignatureError, match=f"before.*{message}"):
        HookContext.from_callable(before=function)
    with pytest.raises(HookSignatureError, match=f"after.*{message}"):
        HookContext.from_callable(after=function)


def test_subclass_with_a_wrong_signature_is_refused() -> None:
    """Methods of a subclass are checked at registration."""

    class Wrong(HookContext[Trace]):
        def before(self) -> None: ...  # type: ignore[override]  # what is tested

        def after(self, args: Trace) -> None: ...

    with pytest.raises(HookSignatureError, match=r"before=.*Wrong\(id="):
        HookContextChannel[Trace]("on_step").register(Wrong())


@pytest.mark.parametrize("function", [lambda a, b=1: None, lambda *a: None, list.append, print])
def test_callables_with_one_argument_are_accepted(function: Any) -> None:
    """Defaults, ``*args`` and builtins without a signature are accepted."""
    if function is list.append:
        function = [].append
    HookContext.from_callable(before=function)


def test_hook_without_callables_is_refused() -> None:
    """A hook needs a before or an after."""
    with pytest.raises(HookSignatureError, match="needs a before or an after"):
        HookContext.from_callable()


class ChannelMachine(RuleBasedStateMachine):
    """Compare a channel with a list under any registrations and removals."""

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
def test_removal_keeps_the_order_of_other_hooks(removed: list[bool]) -> None:
    """Removing any subset keeps the order of the others."""
    channel = HookContextChannel[Trace]("on_step")
    handles = [channel.register(recording(str(i))) for i in range(len(removed))]
    for handle, remove in zip(handles, removed, strict=True):
        if remove:
            handle()
    assert trace_of(channel) == nested([str(i) for i, gone in enumerate(removed) if not gone])


def test_a_callable_in_the_position_of_the_name_is_refused() -> None:
    """from_callable(None, before, after) would run ``before`` as the after."""
    with pytest.raises(
        HookSignatureError, match=r"name must be a string.*before=\.\.\. and after="
    ):
        HookContext.from_callable(None, print, print)  # type: ignore[arg-type]  # what is tested


def test_a_channel_of_another_name_is_refused() -> None:
    """Hooks of on_step must not run around another stage."""
    epoch, step = HookContextChannel[Trace]("on_epoch"), HookContextChannel[Trace]("on_step")
    with pytest.raises(HookRegistrationError, match=r"on_epoch requires .* the channel on_step"):
        epoch.register(step)
    assert len(epoch) == 0


def test_wrapper_replaces_and_adds_entries() -> None:
    """A wrapped channel runs the entries that the wrapper returns, and describes the hooks."""
    channel = HookContextChannel[Trace]("on_step")
    channel.register(recording("a"))
    before = repr(channel)
    handle = wrapped(channel, "w")
    assert trace_of(channel) == [
        *("before outer w", "w:", "before a", "before inner w", "body"),
        *("after inner w", "w:", "after a", "after outer w"),
    ]
    assert repr(channel) == before
    assert len(channel) == 1
    handle.remove()
    assert trace_of(channel) == nested(["a"])


def test_wrapper_of_a_registered_channel_sees_all_hooks() -> None:
    """The wrapper of a channel applies to the hooks of the channel in which it is registered."""
    outer, inner = HookContextChannel[Trace]("on_step"), HookContextChannel[Trace]("on_step")
    outer.register(recording("a"))
    handle = outer.register(inner)
    wrapped(inner, "w")
    assert trace_of(outer)[:4] == ["before outer w", "w:", "before a", "before inner w"]
    outer.register(recording("b"))  # wrapped from the next entry on
    assert trace_of(outer)[3:5] == ["w:", "before b"]
    handle.remove()
    assert trace_of(outer) == nested(["a", "b"])


def test_wrappers_nest() -> None:
    """A later wrapper gets the entries of an earlier one."""
    channel = HookContextChannel[Trace]("on_step")
    wrapped(channel, "first")
    wrapped(channel, "second")
    assert trace_of(channel)[:4] == [
        *("before outer second", "second:", "before outer first", "second:"),
    ]


def test_wrapped_channel_without_hooks_runs_its_entries() -> None:
    """A channel without hooks runs the entries that a wrapper adds, and is still empty."""
    channel = HookContextChannel[Trace]("on_step")
    handle = wrapped(channel, "w")
    assert trace_of(channel) == [
        *("before outer w", "before inner w", "body", "after inner w", "after outer w"),
    ]
    assert len(channel) == 0
    handle.remove()
    assert trace_of(channel) == ["body"]


@pytest.mark.parametrize("failing", ["outer w", "b", "inner w", "body"])
def test_failure_in_a_wrapped_channel(failing: str) -> None:
    """After an error, exactly the entered entries exit, those of the wrapper included."""
    channel = HookContextChannel[Trace]("on_step")
    for name in ("a", "b", "c"):
        channel.register(recording(name))
    wrapped(channel, "w")

    class Failing(list[str]):
        def append(self, text: str) -> None:
            super().append(text)
            if text in (f"before {failing}", failing):
                raise RuntimeError("on purpose")

    trace = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        channel.run(trace, lambda trace: trace.append("body"))
    order = ["outer w", "a", "b", "c", "inner w", "body"]
    entered = order[: order.index(failing)]
    assert [text for text in trace if text.startswith("after")] == [
        f"after {name}" for name in reversed(entered)
    ]
