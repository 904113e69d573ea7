"""Accounting of the times of nested channels, hooks and stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.hook import HookContext, HookContextChannel
from robo_orchard_lab.pipeline.hook_times import STAGES, HookTimes
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName

Body = Callable[[Any], Any]


class Channels:
    """Channels with two hooks each, wrapped as a profiler does."""

    name = "profiler"

    def __init__(self) -> None:
        self.times = HookTimes(lambda entry: "hooks", range(1, 4))
        self.fails_at = -1
        self.calls: dict[tuple[str, str], int] = {}
        self._channels = {name: self._make(name) for name in CHANNEL_NAMES}

    def _make(self, name: ChannelName) -> HookContextChannel[Any]:
        channel = HookContextChannel[Any](name)
        for hook in ("a", "b"):
            make: Any = HookContext.from_callable
            channel.register(make(self._hook(name, hook), self._hook(name, hook), hook))
        channel.wrap(lambda entries: self.times.wrap(name, self, entries))
        return channel

    def _hook(self, channel: str, name: str) -> Body:
        def run(args: Any) -> None:
            self.calls[channel, name] = self.calls.get((channel, name), 0) + 1
            self.fails_at -= 1
            if self.fails_at == 0:
                raise RuntimeError("on purpose")

        return run

    def run(self, name: ChannelName, *inside: Body) -> Body:
        """Return a function that opens a channel around others."""

        def body(args: Any) -> None:
            for each in inside:
                each(args)

        return lambda args: self._channels[name].run(args, body)


def train(channels: Channels, plan: list[int]) -> None:
    """Run a loop of epochs; each number of the plan chooses what happens in and after a step."""
    run = channels.run
    work = run("on_model_forward"), run("on_model_backward")
    update = run("on_optimizer_step")
    kinds = [
        (run("on_step", run("on_batch", *work), update),),
        (run("on_step", run("on_batch", *work)), run("on_evaluation")),
        (run("on_step", run("on_batch", work[0], update, *work, update)),),
        (run("on_step", run("on_batch", work[0])), lambda args: evaluate(channels)),
    ]
    epochs = [[kind for number in plan[i : i + 3] for kind in kinds[number]] for i in (0, 3, 6)]
    with suppress(RuntimeError):
        run("on_loop", *(run("on_epoch", *steps) for steps in epochs))(None)


def evaluate(channels: Channels) -> None:
    channels.times.evaluate(0)


@given(
    plan=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    fails_at=st.integers(0, 120),
    again=st.booleans(),
)
def test_all_time_and_all_calls_are_accounted_for(
    plan: list[int], fails_at: int, again: bool
) -> None:
    """Whatever is open, fails or is evaluated in parts, no time and no call is lost."""
    channels = Channels()
    channels.fails_at = fails_at
    began = perf_counter()
    train(channels, plan)
    channels.times.evaluate(len(plan), at_end=True)
    if again:
        train(channels, plan)
        channels.times.evaluate(2 * len(plan), at_end=True)
    times = channels.times
    stages, step = times.sums("stage"), times.sums("step")[""]
    assert sum(stages.values()) == pytest.approx(step)
    assert set(stages) <= set(STAGES)
    assert step + (times.first_step_s or 0.0) < perf_counter() - began
    found: dict[tuple[str, str], int] = {}
    for part in times.parts:
        assert 0 <= part.self_s <= part.total_s + 1e-12
        if part.hook is not None:
            key = part.channel, part.hook
            found[key] = found.get(key, 0) + part.calls
    assert {key: count for key, count in found.items() if count} == channels.calls
    own = [part.self_s for part in times.parts if part.hook is not None]
    first = [part.first_s for part in times.parts if part.hook is not None]
    assert times.sums("hook").get("a", 0.0) <= sum(own) + sum(first) + 1e-12


def test_interrupt_within_a_mark() -> None:
    """A key without its time, as an interrupt leaves it, does not break the evaluation."""
    channels = Channels()
    channels.run("on_loop", channels.run("on_epoch", channels.run("on_step")))(None)
    channels.times._keys.append(0)
    channels.times.evaluate(1, at_end=True)
    assert channels.times.first_step_s is not None


def test_many_patterns() -> None:
    """Steps with more sequences of marks than are kept are all measured."""
    channels = Channels()
    run = channels.run
    steps = [run("on_step", *[run("on_batch")] * count) for count in range(300)]
    run("on_loop", run("on_epoch", *steps, *steps))(None)
    channels.times.evaluate(600, at_end=True)
    assert channels.times.steps == 599
    (batch,) = (p for p in channels.times.parts if (p.channel, p.phase) == ("on_batch", None))
    assert batch.calls == 2 * sum(range(300))


def test_medians_are_of_the_last_steps() -> None:
    """The medians forget steps before the last hundred."""
    channels = Channels()
    run = channels.run
    slow = run("on_step", lambda args: sum(range(20_000)))
    quick = run("on_step")
    run("on_loop", run("on_epoch", *[slow] * 60, *[quick] * 100))(None)
    channels.times.evaluate(160, at_end=True)
    sums, medians = channels.times.sums("step"), channels.times.medians("step")
    assert medians[""] < sums[""] / 159
