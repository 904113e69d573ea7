"""Steps and epochs at which triggers are due in runs, compared with plain counting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import CHANNEL_NAMES, ChannelName, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.trigger import (
    AnyOf,
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySteps,
    First,
    Last,
    Role,
    Trigger,
    TriggerError,
)
from tiny import make_loader, make_trainer


class Step(NamedTuple):
    """Step of a run, counted by hand."""

    number: int
    """From 1."""
    epoch: int
    """From 1."""
    ends_epoch: bool
    boundary: bool
    """True if an update is due."""
    updates: int
    """Number of updates committed before."""
    committed: bool
    """True if the update of this step is committed."""


@dataclass(frozen=True)
class RunSetting:
    """Settings of a run, and its steps by plain counting."""

    batches: int = 3
    window: int = 1
    max_step: int | None = None
    max_optimizer_step: int | None = None
    max_epoch: int | None = None
    skips: frozenset[int] = frozenset()
    """Skipped updates, counting due updates from 0."""
    sized: bool = True
    """True if the data has a length."""

    def steps(self) -> Iterator[Step]:
        number = updates = due = 0
        for epoch in range(1, 1000):
            in_window = 0
            for batch in range(1, self.batches + 1):
                number, in_window = number + 1, in_window + 1
                ends_epoch = batch == self.batches
                boundary = in_window == self.window or ends_epoch or number == self.max_step
                committed = boundary and due not in self.skips
                yield Step(number, epoch, ends_epoch, boundary, updates, committed)
                updates, due = updates + committed, due + boundary
                in_window = 0 if boundary else in_window
                if number == self.max_step or updates == self.max_optimizer_step:
                    return
            if epoch == self.max_epoch:
                return

    def epochs(self) -> list[tuple[int, bool]]:
        """Return each epoch from 1, with True if the trainer knows that it was completed."""
        *_, last = steps = [*self.steps()]
        limited = last.number == self.max_step or (
            last.updates + last.committed == self.max_optimizer_step
        )
        last_completed = last.ends_epoch and (self.sized or not limited)
        return [(e, e < last.epoch or last_completed) for e in range(1, steps[-1].epoch + 1)]

    def run(self, hooks: Any, **options: Any) -> Any:
        """Run a trainer with these settings and return it."""
        skipping = PipelineHooks()

        @skipping.on_optimizer_step.before
        def skip(args: PipelineHookArgs) -> None:
            progress = args.progress
            if progress.optimizer_step_id + progress.skipped_optimizer_steps in self.skips:
                args.skip_reason = "planted"

        loader = make_loader(self.batches - 1, batch_size=2, rest=1)
        trainer = make_trainer(
            [skipping, *hooks],
            loader=loader if self.sized else Unsized(loader),
            accumulate=self.window,
            max_step=self.max_step,
            max_optimizer_step=self.max_optimizer_step,
            max_epoch=self.max_epoch,
            **options,
        )
        trainer()
        return trainer


class Unsized:
    """Data without a length."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def is_nth(when: EverySteps | EveryOptimizerSteps | EveryEpochs, number: int) -> bool:
    """Count on from the start; ``number`` counts from 1, and the start of a trigger from 0."""
    return number - 1 in range(when.n - 1 if when.start is None else when.start, number, when.n)


def expected(when: Trigger, channel: ChannelName, role: Role, setting: RunSetting) -> list[int]:
    """Return the numbers of the steps, or on ``on_epoch`` of the epochs, that must be due."""
    if isinstance(when, AnyOf):
        parts = [expected(part, channel, role, setting) for part in when.triggers]
        return sorted(set().union(*parts))
    if channel == "on_epoch":
        ended = [(e, c or role == "before") for e, c in setting.epochs()]
        if isinstance(when, Last):
            return [epoch for epoch, _ in ended if ends_with(epoch, role, setting)]
        return [
            e
            for e, completed in ended
            if completed and (is_nth(when, e) if isinstance(when, EveryEpochs) else e == 1)
        ]
    updated = channel == "on_optimizer_step" and role == "after"

    def is_due(step: Step) -> bool:
        # A due update is predicted before it is committed.
        update = (step.committed if updated else step.boundary) and step.updates + 1
        if isinstance(when, EverySteps):
            return is_nth(when, step.number)
        if isinstance(when, EveryOptimizerSteps):
            return bool(update) and is_nth(when, update)
        if isinstance(when, EveryEpochs):
            return step.ends_epoch and is_nth(when, step.epoch)
        if isinstance(when, AtSteps):
            return step.number in when.steps
        if isinstance(when, First):
            firsts = (s.number for s in setting.steps() if s.boundary)
            return step.number == (next(firsts, 0) if channel == "on_optimizer_step" else 1)
        assert isinstance(when, Last)
        ends_epochs = setting.sized and step.ends_epoch and step.epoch == setting.max_epoch
        limits = setting.max_step, setting.max_optimizer_step
        return ends_epochs or step.number == limits[0] or (bool(update) and update == limits[1])

    reached = [s for s in setting.steps() if s.boundary or channel != "on_optimizer_step"]
    return [step.number for step in reached if is_due(step)]


def ends_with(epoch: int, role: Role, setting: RunSetting) -> bool:
    """Return True if an epoch is the last, judged before or after the epoch."""
    last = setting.epochs()[-1][0]
    if role == "after" or setting.sized:
        return epoch == last
    return epoch == setting.max_epoch


STEP_CHANNELS: tuple[ChannelName, ...] = CHANNEL_NAMES[2:7]
ROLES: tuple[Role, ...] = ("before", "after")
small = st.integers(1, 5)
starts = st.none() | st.integers(0, 7)
due_on_steps = st.one_of(
    st.builds(EverySteps, small, starts),
    st.builds(EveryOptimizerSteps, small, starts),
    st.builds(AtSteps, st.sets(st.integers(1, 12), min_size=1, max_size=4)),
    st.just(First()),
    st.just(Last()),
)
due_on_epochs = st.one_of(st.builds(EveryEpochs, small, starts), st.just(First()), st.just(Last()))


def joined(parts: st.SearchStrategy[Trigger]) -> st.SearchStrategy[Trigger]:
    return parts | st.tuples(parts, parts).map(AnyOf)


runs = st.builds(
    RunSetting,
    batches=small,
    window=st.integers(1, 4),
    max_step=st.none() | st.integers(1, 12),
    max_optimizer_step=st.none() | small,
    max_epoch=st.integers(1, 3),
    skips=st.frozensets(st.integers(0, 6), max_size=3),
    sized=st.booleans(),
)


class Firing(PipelineHooks):
    """Hook that records the step or epoch at which each of its functions ran."""

    def __init__(self, triggers: list[Trigger], channels: tuple[ChannelName, ...]) -> None:
        super().__init__()
        self.fired: dict[tuple[Trigger, ChannelName, str], list[int]] = {}
        for when in triggers:
            for channel in channels:
                self._register(when, channel, ["before"])
                self._register(when, channel, ["after"])
                self._register(when, channel, ["before", "after"])

    def _register(self, when: Trigger, channel: ChannelName, roles: list[Role]) -> None:
        def noting(role: str) -> Callable[[PipelineHookArgs], None]:
            kind = role if len(roles) == 1 else f"{role} of both"
            fired = self.fired[when, channel, kind] = []

            def note(args: PipelineHookArgs) -> None:
                fired.append(1 + (args.epoch_id if channel == "on_epoch" else args.global_step_id))

            return note

        functions: dict[str, Any] = {role: noting(role) for role in roles}
        self.register_hook(channel, HookContext.from_callable(**functions), when)


def check(firing: Firing, setting: RunSetting) -> None:
    for (when, channel, kind), fired in firing.fired.items():
        # A pair runs as decided in its before.
        role: Role = "after" if kind == "after" else "before"
        is_predicted = isinstance(when, Last) or Last() in getattr(when, "triggers", ())
        if channel == "on_epoch" and role == "before" and setting.skips and is_predicted:
            continue  # the epoch predicted as last may not be the last
        message = f"{when} on {channel}, {kind}, in {setting}"
        assert fired == expected(when, channel, role, setting), message


@given(
    runs,
    st.lists(
        joined(due_on_steps | st.builds(EveryEpochs, small, starts)),
        min_size=1,
        max_size=3,
        unique=True,
    ),
)
@settings(max_examples=60, deadline=None)
@example(RunSetting(3, 2, max_epoch=2, max_optimizer_step=3, skips=frozenset({1})), [Last()])
@example(RunSetting(3, 2, max_step=4, max_epoch=2), [Last(), EveryOptimizerSteps(2)])
@example(RunSetting(2, 3, max_epoch=2, sized=False), [Last(), First()])
def test_steps_are_due_as_counted(setting: RunSetting, triggers: list[Trigger]) -> None:
    """Steps are due as counted on every step channel, with short windows and skipped updates."""
    assume(setting.sized or all("epoch" not in str(when) for when in triggers))
    firing = Firing(triggers, STEP_CHANNELS)
    trainer = setting.run([firing])
    *_, last = setting.steps()
    assert trainer.progress.global_step_id == last.number
    check(firing, setting)


@given(runs, st.lists(joined(due_on_epochs), min_size=1, max_size=3, unique=True))
@settings(max_examples=40, deadline=None)
@example(RunSetting(3, 2, max_epoch=3, max_optimizer_step=3), [Last()])
@example(RunSetting(3, 1, max_epoch=3, max_step=4), [Last() | First()])
def test_epochs_are_due_as_counted(setting: RunSetting, triggers: list[Trigger]) -> None:
    """The after of an incomplete epoch is due only at the end of the run."""
    firing = Firing(triggers, ("on_epoch",))
    setting.run([firing])
    check(firing, setting)


@given(runs.filter(lambda run: run.sized and not run.skips))
@settings(max_examples=20, deadline=None)
def test_last_is_due_once(setting: RunSetting) -> None:
    """``last`` is due once, at the end, if lengths are known and no update is skipped."""
    firing = Firing([Last()], ("on_step",))
    trainer = setting.run([firing])
    assert set(map(tuple, firing.fired.values())) == {(trainer.progress.global_step_id,)}


@given(runs, joined(due_on_steps | due_on_epochs))
@settings(max_examples=40, deadline=None)
def test_register_at_commit_uses_exact_channel(setting: RunSetting, when: Trigger) -> None:
    """Each part of a trigger calls the function on its exact channel."""
    called: set[tuple[str, int]] = set()
    hooks = PipelineHooks()
    handle = hooks.register_at_commit(
        lambda args: called.add(
            ("step", args.global_step_id + 1)
            if args.progress.in_step
            else ("epoch", args.epoch_id + 1)
        ),
        when,
    )
    setting.run([hooks])
    due: set[tuple[str, int]] = set()
    for part in when.triggers if isinstance(when, AnyOf) else [when]:
        channel = {
            EveryOptimizerSteps: "on_optimizer_step",
            EveryEpochs: "on_epoch",
            Last: "on_epoch",
        }.get(type(part), "on_step")
        kind = "epoch" if channel == "on_epoch" else "step"
        due |= {(kind, number) for number in expected(part, channel, "after", setting)}  # type: ignore[arg-type]  # a channel
    assert called == due
    handle.remove()
    handle.remove()
    assert all(len(hooks.get_channel(channel)) == 0 for channel in CHANNEL_NAMES)


EVERYTHING: list[Trigger] = [
    EverySteps(2),
    EverySteps(3) | AtSteps({5}),
    EveryOptimizerSteps(1),
    EveryOptimizerSteps(2, start=0),
    EverySteps(4, start=0),
    AtSteps({1, 4}),
    First(),
    Last(),
]


@pytest.mark.parametrize(
    "setting",
    [
        RunSetting(batches=3, window=1, max_step=7),
        RunSetting(batches=5, window=2, max_epoch=2, skips=frozenset({1})),
        RunSetting(batches=4, window=3, max_epoch=5, max_optimizer_step=5),
    ],
    ids=str,
)
def test_resumed_run_fires_as_uninterrupted_run(setting: RunSetting, tmp_path: Path) -> None:
    """After every stop, a resumed run fires equally, except a ``before`` of a reentered epoch."""
    uninterrupted = Firing(EVERYTHING, STEP_CHANNELS)
    of_epochs = Firing([EveryEpochs(2), First(), Last()], ("on_epoch",))
    of_epochs.name = "epochs"
    steps = setting.run([uninterrupted, of_epochs]).progress.global_step_id
    for stop in range(1, steps):
        parts = []
        for part in ("first", "second"):
            firing = Firing(EVERYTHING, STEP_CHANNELS)
            epochs = Firing([EveryEpochs(2), First(), Last()], ("on_epoch",))
            epochs.name = "epochs"
            folder = tmp_path / str(stop)
            stopping = PipelineHooks()
            if part == "first":
                stopping.register_hook(
                    "on_step",
                    HookContext.from_callable(after=lambda args: args.requests.stop("half")),
                    AtSteps({stop}),
                )
                setting.run([firing, epochs, stopping]).save_checkpoint(folder)
            else:
                setting.run([firing, epochs], resume_from=folder)
            parts.append((firing.fired, epochs.fired))
        (first, first_epochs), (second, second_epochs) = parts
        for key, fired in uninterrupted.fired.items():
            assert first[key] + second[key] == fired, f"{key}, stopped after step {stop}"
        for key, fired in of_epochs.fired.items():
            both = first_epochs[key] + second_epochs[key]
            if key[2] == "after":
                assert both == fired, f"{key}, stopped after step {stop}"
            else:
                assert sorted(set(both)) == fired, f"{key}, stopped after step {stop}"


class Clock:
    """Clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ("20 s", [4, 7, 10]),
        ("20 s | at steps 5", [4, 5, 7, 10]),
        ("at steps 4 | 20 s", [4, 7, 10]),  # the clock is read in step 4 as well
    ],
)
def test_seconds_count_from_last_time(
    when: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step after the period fires; a new run starts a new period."""
    clock = Clock(monkeypatch)
    fired: list[int] = []
    hooks = PipelineHooks()
    timed: HookContext[PipelineHookArgs] = HookContext.from_callable(
        after=lambda args: fired.append(args.global_step_id + 1)
    )
    hooks.register_hook("on_step", timed, when)

    @hooks.on_batch.before
    def wait(args: PipelineHookArgs) -> None:
        clock.now += 30 if args.global_step_id == 6 else 8

    RunSetting(batches=5, max_step=12).run([hooks])
    assert fired == steps
    fired.clear()
    clock.now += 1000
    RunSetting(batches=5, max_step=12).run([hooks])
    assert fired == steps


def test_failing_step_does_not_fire_clock_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock trigger waits for a step without an error."""
    clock = Clock(monkeypatch)
    fired: list[int] = []
    hooks = PipelineHooks()
    timed: HookContext[PipelineHookArgs] = HookContext.from_callable(
        after=lambda args: fired.append(args.global_step_id)
    )
    hooks.register_hook("on_step", timed, "1 s")

    @hooks.on_batch.before
    def wait(args: PipelineHookArgs) -> None:
        clock.now += 2
        if args.global_step_id == 2:
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        RunSetting(max_step=3).run([hooks])
    assert fired == [1]


@pytest.mark.parametrize("channel", ["on_step", "on_optimizer_step"])
def test_every_epoch_is_due_in_its_last_step(channel: ChannelName) -> None:
    """Every n-th epoch is due in its last step on step channels."""
    fired: list[int] = []
    hooks = PipelineHooks("counts")
    hook = HookContext[PipelineHookArgs].from_callable(
        after=lambda args: fired.append(args.progress.steps_done)
    )
    hooks.register_hook(channel, hook, "2 epochs | at steps 4")
    make_trainer([hooks], loader=make_loader(3), max_epoch=5)()
    assert fired == [4, 6, 12]


def test_epoch_trigger_on_step_requires_length() -> None:
    """An epoch trigger on a step is refused in the first step, with the remedy."""
    hooks = PipelineHooks("counts")
    hooks.on_step.after(when="1 epoch")(print)
    with pytest.raises(TriggerError, match=r"'1 epoch': no step can be .* register .* on_epoch"):
        make_trainer([hooks], loader=(batch for batch in make_loader(3)), max_epoch=1)()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_first_update_is_end_of_first_window(accumulate: int) -> None:
    """``first`` is the first update on ``on_optimizer_step``."""
    fired: list[int] = []
    hooks = PipelineHooks("counts")
    for role in (hooks.on_optimizer_step.before, hooks.on_optimizer_step.after):

        @role(when="first")
        def note(args: PipelineHookArgs) -> None:
            fired.append(args.progress.steps_done)

    make_trainer([hooks], loader=make_loader(6), accumulate=accumulate, max_epoch=2)()
    assert fired == [accumulate, accumulate]
