"""Failures of hooks, compared with a model."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.hook import HookContext, HookContextChannel, later_errors


class BoomError(Exception):
    """Deliberate error at a named point."""


class Args:
    """Hook arguments with an exception attribute."""

    def __init__(self) -> None:
        self.exception: BaseException | None = None
        self.trace: list[tuple[str, str | None]] = []

    def visit(self, place: str, failing: frozenset[str]) -> None:
        """Record the point and the current error; fail if requested."""
        self.trace.append((place, str(self.exception) if self.exception else None))
        if place in failing:
            raise BoomError(place)


class Recorder(HookContext[Args]):
    def __init__(self, number: int, failing: frozenset[str]) -> None:
        self.name = f"hook {number}"
        self.number = number
        self.failing = failing

    def before(self, args: Args) -> None:
        args.visit(f"before {self.number}", self.failing)

    def after(self, args: Args) -> None:
        args.visit(f"after {self.number}", self.failing)


def expected(hooks: int, failing: frozenset[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Return trace and errors of nested ``try``/``finally`` as a model."""
    trace: list[tuple[str, str | None]] = []
    errors: list[str] = []

    def visit(place: str) -> bool:
        trace.append((place, errors[0] if errors else None))
        if place in failing:
            errors.append(place)
        return place not in failing

    def nest(number: int) -> None:
        if number == hooks:
            visit("body")
        elif visit(f"before {number}"):
            nest(number + 1)
            visit(f"after {number}")

    nest(0)
    return trace, errors


def run_in_channel(args: Args, recorders: list[Recorder], failing: frozenset[str]) -> None:
    channel = HookContextChannel[Args]("on_step")
    for recorder in recorders:
        channel.register(recorder)
    channel.run(args, lambda args: args.visit("body", failing))


def run_in_with(args: Args, recorders: list[Recorder], failing: frozenset[str]) -> None:
    channel = HookContextChannel[Args]("on_step")
    for recorder in recorders:
        channel.register(recorder)
    with channel.begin(args):
        args.visit("body", failing)


def run_in_nested_channels(args: Args, recorders: list[Recorder], failing: frozenset[str]) -> None:
    outer = HookContextChannel[Args]("on_step")
    for recorder in recorders:
        inner = HookContextChannel[Args]("on_step")
        inner.register(recorder)
        outer.register(inner)
    outer.run(args, lambda args: args.visit("body", failing))


def run_one_in_another(args: Args, recorders: list[Recorder], failing: frozenset[str]) -> None:
    if not recorders:
        args.visit("body", failing)
        return
    with recorders[0].begin(args):
        run_one_in_another(args, recorders[1:], failing)


WAYS = [run_in_channel, run_in_with, run_in_nested_channels, run_one_in_another]


def check(hooks: int, failing: frozenset[str]) -> None:
    for way in WAYS:
        args = Args()
        recorders = [Recorder(number, failing) for number in range(hooks)]
        trace, errors = expected(hooks, failing)
        if not errors:
            way(args, recorders, failing)
        else:
            with pytest.raises(BoomError) as raised:
                way(args, recorders, failing)
            first = raised.value
            assert str(first) == errors[0]
            assert [str(error) for error in later_errors(first)] == errors[1:]
            check_notes(first, errors)
        assert args.trace == trace, way.__name__


def check_notes(first: BaseException, errors: list[str]) -> None:
    """Check that each error names its hook, and that the first shows the others."""
    for error in (first, *later_errors(first)):
        place = str(error)
        origin = (
            [note for note in error.__notes__ if note.startswith("raised in hook")]
            if (hasattr(error, "__notes__"))
            else []
        )
        if place == "body":
            assert origin == []
        else:
            role, number = place.split()
            assert len(origin) == 1
            assert f"'hook {number}'" in origin[0]
            assert role in origin[0]
            assert "test_failures.py:" in origin[0]
    shown = "\n".join(getattr(first, "__notes__", []))
    for place in errors[1:]:
        assert f"BoomError: {place}" in shown


def places(hooks: int) -> list[str]:
    return [*(f"{role} {n}" for n in range(hooks) for role in ("before", "after")), "body"]


@pytest.mark.parametrize("hooks", range(6))
def test_any_two_failures_exit_all_entered_hooks(hooks: int) -> None:
    """One or two failures among five hooks behave like nested contexts."""
    check(hooks, frozenset())
    for count in (1, 2):
        for failing in combinations(places(hooks), count):
            check(hooks, frozenset(failing))


@given(st.data())
def test_any_set_of_failures_exits_all_entered_hooks(data: st.DataObject) -> None:
    """Trace and errors equal those of nested contexts for any set of failures."""
    hooks = data.draw(st.integers(0, 5))
    check(hooks, frozenset(data.draw(st.sets(st.sampled_from(places(hooks))))))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_interrupts_exit_all_hooks(error: BaseException) -> None:
    """Every hook sees an interrupt of the body and exits."""

    def body(args: Args) -> None:
        raise error

    args = Args()
    channel = HookContextChannel[Args]("on_step")
    channel.register(Recorder(0, frozenset()))
    with pytest.raises(type(error)) as raised:
        channel.run(args, body)
    assert raised.value is error
    assert [place for place, _ in args.trace] == ["before 0", "after 0"]
    assert args.trace[1][1] == str(error)


def test_reraising_the_same_error_attaches_nothing() -> None:
    """An after that raises ``args.exception`` adds no later error."""

    def reraise(args: Args) -> None:
        assert args.exception is not None
        raise args.exception

    channel = HookContextChannel[Args]("on_step")
    channel.register(HookContext.from_callable(after=reraise))
    with pytest.raises(BoomError) as raised:
        channel.run(Args(), lambda args: args.visit("body", frozenset({"body"})))
    assert later_errors(raised.value) == ()


def test_arguments_need_no_exception_attribute() -> None:
    """Arguments without an ``exception`` attribute are passed unchanged."""
    seen: list[int] = []
    channel = HookContextChannel[int]("on_number")
    channel.register(HookContext.from_callable(after=seen.append))
    with pytest.raises(ZeroDivisionError):
        channel.run(0, lambda number: 1 // number)
    assert seen == [0]


def test_error_keeps_the_note_of_its_hook() -> None:
    """An outer hook that opened the inner channel adds no second note."""
    inner = HookContextChannel[Args]("on_optimizer_step")
    inner.register(Recorder(1, frozenset({"after 1"})))
    outer = HookContextChannel[Args]("on_step")
    outer.register(
        HookContext.from_callable(after=lambda args: inner.run(args, lambda _: None), name="owner")
    )
    with pytest.raises(BoomError) as raised:
        outer.run(Args(), lambda args: None)
    (note,) = raised.value.__notes__
    assert note.startswith("raised in hook 'hook 1' (on_optimizer_step, after)")


def test_text_of_many_failures_grows_linearly() -> None:
    """Each later error is shown once."""

    def size(hooks: int) -> int:
        channel = HookContextChannel[Args]("on_step")
        for number in range(hooks):
            channel.register(Recorder(number, frozenset({f"after {number}"})))
        with pytest.raises(BoomError) as raised:
            channel.run(Args(), lambda args: args.visit("body", frozenset({"body"})))
        assert len(later_errors(raised.value)) == hooks
        return len("\n".join(raised.value.__notes__))

    assert size(16) < 2.2 * size(8)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Exception without notes and attributes."""

    text: str


def test_errors_without_notes_still_exit_all_hooks(caplog: pytest.LogCaptureFixture) -> None:
    """An error that can't carry notes propagates, and the log has the other errors."""

    def fail(text: str) -> Callable[[Args], None]:
        def hook(args: Args) -> None:
            args.trace.append((text, None))
            raise FrozenError(text)

        return hook

    args = Args()
    channel = HookContextChannel[Args]("on_step")
    channel.register(HookContext.from_callable(after=fail("outer"), name="outer"))
    channel.register(HookContext.from_callable(before=fail("inner"), name="inner"))
    with pytest.raises(FrozenError, match="inner"):
        channel.run(args, lambda args: None)
    assert [place for place, _ in args.trace] == ["inner", "outer"]
    assert "raised in hook 'inner' (on_step, before)" in caplog.text
    assert "another error was raised" in caplog.text
    assert "FrozenError" in caplog.text


class ReadOnly:
    """Arguments with a read-only exception."""

    @property
    def exception(self) -> None:
        return None


def test_read_only_arguments_still_exit_all_hooks() -> None:
    """A read-only ``exception`` prevents no exit."""
    left: list[ReadOnly] = []
    channel = HookContextChannel[ReadOnly]("on_step")
    channel.register(HookContext.from_callable(after=left.append))

    def body(args: ReadOnly) -> None:
        raise BoomError("body")

    args = ReadOnly()
    with pytest.raises(BoomError, match="body"):
        channel.run(args, body)
    assert left == [args]


def test_exception_is_reset_after_the_scope() -> None:
    """The next entry with the same arguments starts without the old error."""
    args = Args()
    channel = HookContextChannel[Args]("on_step")
    channel.register(Recorder(0, frozenset()))
    with pytest.raises(BoomError):
        channel.run(args, lambda args: args.visit("body", frozenset({"body"})))
    args.trace.clear()
    channel.run(args, lambda args: None)
    assert args.trace == [("before 0", None), ("after 0", None)]


def test_error_keeps_no_arguments_alive() -> None:
    """Arguments are freed with a caught error, without the garbage collector."""
    channel = HookContextChannel[Args]("on_step")
    channel.register(Recorder(0, frozenset()))

    def run() -> weakref.ref[Args]:
        args = Args()
        with suppress(BoomError):
            channel.run(args, lambda args: args.visit("body", frozenset({"body"})))
        return weakref.ref(args)

    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()
