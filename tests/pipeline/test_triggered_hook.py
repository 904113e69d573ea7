"""Hooks with a trigger: pairs, errors, repr, and the decorators."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest

from robo_orchard_core.utils.hook import HookContextChannel, HookRegistrationError
from robo_orchard_lab.pipeline import CHANNEL_NAMES, ChannelName, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.trigger import EverySteps, Last, TriggerError
from tiny import make_trainer


def test_before_decides_for_after() -> None:
    """The trigger is evaluated in the before, and the after follows that decision."""
    seen: list[str] = []

    def note(role: str) -> Callable[[PipelineHookArgs], None]:
        return lambda args: seen.append(f"{role} {args.global_step_id} {args.update_committed}")

    hooks = PipelineHooks()
    pair = HookContext.from_callable(note("before"), note("after"))
    hooks.register_hook("on_optimizer_step", pair, "2 optimizer steps")
    alone = HookContext.from_callable(after=note("alone"))
    hooks.register_hook("on_optimizer_step", alone, "2 optimizer steps")
    skipping = PipelineHooks()

    @skipping.on_optimizer_step.before
    def skip(args: PipelineHookArgs) -> None:
        args.skip_reason = "planted" if args.global_step_id == 1 else None

    make_trainer([skipping, hooks], max_step=5)()
    assert seen == [
        *("before 1 None", "after 1 False"),  # the second update is skipped,
        *("before 2 None", "alone 2 True", "after 2 True"),  # and committed in the third step
        *("before 4 None", "alone 4 True", "after 4 True"),
    ]


def test_after_of_entered_hook_runs_on_error() -> None:
    """The after of an entered hook sees the error of the body, as with every hook."""
    seen: list[tuple[int, str]] = []
    hooks = PipelineHooks()
    pair: HookContext[PipelineHookArgs] = HookContext.from_callable(
        before=lambda args: seen.append((args.global_step_id, "before")),
        after=lambda args: seen.append((args.global_step_id, repr(args.exception))),
    )
    hooks.register_hook("on_step", pair, "2 steps")

    @hooks.on_batch.before
    def fail(args: PipelineHookArgs) -> None:
        if args.global_step_id == 3:
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        make_trainer(hooks, max_step=5)()
    assert seen == [(1, "before"), (1, "None"), (3, "before"), (3, "ValueError('planted')")]


@pytest.mark.parametrize(
    ("channel", "when", "message"),
    [
        (
            "on_epoch",
            "10 steps",
            "10 steps can never be due on on_epoch; register .* on on_step or",
        ),
        ("on_loop", "first", "first can never be due on on_loop; .*on_step or .* or on_epoch"),
        ("on_evaluation", "1 epoch", "1 epoch can never be due on on_evaluation.* on on_epoch or"),
        (
            "on_epoch",
            "10 steps | 2 epochs",
            r"'10 steps' in '10 steps \| 2 epochs' can never be due on on_epoch, only on on_step or"
            ".*register_at_commit",
        ),
        ("on_step", "10 stepps", "can't read '10 stepps'"),
        ("on_step", 10, "10 of what"),
    ],
)
def test_trigger_never_due_is_refused(channel: ChannelName, when: Any, message: str) -> None:
    """The error comes at registration, and nothing is registered."""
    hooks = PipelineHooks()
    with pytest.raises(TriggerError, match=message):
        hooks.register_hook(channel, HookContext.from_callable(print), when)
    assert len(hooks.get_channel(channel)) == 0


def test_trigger_requires_hook_context() -> None:
    """A channel with a trigger is refused, not registered without the trigger."""
    channel = HookContextChannel[PipelineHookArgs]("mine")
    with pytest.raises(HookRegistrationError, match="HookContext with a trigger, got HookContextC"):
        PipelineHooks().register_hook("on_step", channel, "2 steps")  # type: ignore[arg-type]


class Stubborn(PipelineHooks):
    def fail(self, args: PipelineHookArgs) -> None:
        raise ValueError("planted")

    def __call__(self, args: PipelineHookArgs) -> None:
        raise ValueError("planted")


def fail(args: PipelineHookArgs, how: str = "") -> None:
    raise ValueError("planted")


def line_of(function: Any) -> str:
    return f"test_triggered_hook.py:{function.__code__.co_firstlineno}"


@pytest.mark.parametrize("role", ["before", "after"])
@pytest.mark.parametrize(
    ("function", "description", "where"),
    [
        (fail, "function fail", line_of(fail)),
        (Stubborn().fail, r"bound method Stubborn\(id=\d+\)\.fail", line_of(Stubborn.fail)),
        (functools.partial(fail, how="much"), "partial of function fail", line_of(fail)),
        (functools.partial(Stubborn().fail), "partial of bound method", line_of(Stubborn.fail)),
        (Stubborn(), r"object Stubborn\(id=\d+\)", line_of(Stubborn.__call__)),
    ],
    ids=["function", "bound method", "partial", "partial of a method", "object"],
)
def test_error_names_triggered_function(
    function: Any, description: str, where: str, role: str
) -> None:
    """The note has the line of the user's function, not of the wrapper."""
    hooks = PipelineHooks("mine")
    functions = {role: function}
    hooks.register_hook("on_step", HookContext.from_callable(**functions), "2 steps")
    with pytest.raises(ValueError, match="planted") as raised:
        make_trainer(hooks, max_step=3)()
    note = raised.value.__notes__[0]
    assert note.startswith(f"raised in hook 'mine' (on_step, {role}): ")
    assert note.endswith(where)
    assert re.search(description, note)


def test_repr_shows_trigger() -> None:
    """The short text of the trigger follows the hook."""
    hooks = PipelineHooks()
    hooks.register_hook("on_step", HookContext.from_callable(after=fail), "100 steps | first")
    hooks.register_hook("on_step", HookContext.from_callable(after=fail))
    lines = [line.strip() for line in repr(hooks).splitlines()]
    (triggered,) = [line for line in lines if "when" in line]
    assert triggered.endswith(")> when 100 steps | first,")
    assert triggered.startswith("after=<FunctionInfo function fail from")


def test_decorators_register_and_return_function() -> None:
    """Decorators work bare, called without arguments, and with a trigger and a name."""
    seen: list[str] = []
    hooks = PipelineHooks("mine")

    @hooks.on_step.before
    def bare(args: PipelineHookArgs) -> None:
        seen.append(f"bare {args.global_step_id}")

    @hooks.on_step.after()
    def called(args: PipelineHookArgs) -> None:
        seen.append(f"called {args.global_step_id}")

    @hooks.on_step.after(when=EverySteps(2), name="second")
    def triggered(args: PipelineHookArgs) -> None:
        seen.append(f"triggered {args.global_step_id}")
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted") as raised:
        make_trainer(hooks, max_step=3)()
    assert seen == ["bare 0", "called 0", "bare 1", "triggered 1", "called 1"]
    assert "hook 'second'" in raised.value.__notes__[0]
    bare(PipelineHookArgs())
    assert seen[-1] == "bare 0"


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_every_channel_has_decorators(channel: ChannelName) -> None:
    """The decorators register on the channel of their name."""
    hooks = PipelineHooks()
    getattr(hooks, channel).before(fail)
    getattr(hooks, channel).after(fail)
    assert [len(hooks.get_channel(name)) for name in CHANNEL_NAMES] == [
        2 * (name == channel) for name in CHANNEL_NAMES
    ]


def test_wrong_use_of_decorators_is_refused() -> None:
    """A trigger without ``when=`` and a decorator used on a class are refused."""
    with pytest.raises(HookRegistrationError, match=r"@hooks\.on_step\.after\(when='2 steps'\)"):
        PipelineHooks().on_step.after("2 steps")  # type: ignore[call-overload]
    with pytest.raises(HookRegistrationError, match=r"@hooks\.on_epoch\.before\(when='last'\)"):
        PipelineHooks().on_epoch.before(Last())  # type: ignore[call-overload]
    with pytest.raises(HookRegistrationError, match=r"on_step\.before needs an instance"):

        class Wrong(PipelineHooks):
            @PipelineHooks.on_step.before  # type: ignore[type-var]  # what the test is about
            def run(self, args: PipelineHookArgs) -> None: ...
