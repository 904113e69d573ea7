"""What a hook promises, as assertions; each runs it several times, each time as a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias, Unpack

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.testing.fixtures import HookSource, RunSetting, completed, listed
from robo_orchard_lab.testing.resume_check import differences, seams
from robo_orchard_lab.testing.run import HookRun, train

Hooks: TypeAlias = HookSource | Iterable[HookSource]


def assert_state_round_trip(
    hook: Hooks,
    *,
    stop_at: int | Iterable[int] | None = None,
    ignore: Iterable[str] = ("perf/*",),
    **setting: Unpack[RunSetting],
) -> None:
    """A run that is stopped, saved and resumed with new hooks is the run that never stopped.

    Compared are the hooks' states, what was published at which step, what was asked for,
    weights and counters, all of them exactly.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> assert_state_round_trip(GradientClippingHookConfig(max_norm=1.0), steps=3)

    Args:
        hook: a configuration, or a function that makes the hook anew; or several of these.
        stop_at: after which steps to stop, a run for each; by default after every one.
        ignore: patterns of what may differ, such as times: names of metrics (``perf/*``) and
            places in states (``MyHook.started_at``).
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the message names the step at which the run was stopped, and what differs
            first.
        ValueError: ``stop_at`` is not within the run, or there is no step to stop after.
    """
    hooks, full, ignored = listed(hook), completed(setting), tuple(ignore)
    straight = train(hooks, full, again=True)
    last = straight.progress.global_step_id - 1
    if last < 1:
        raise ValueError(f"a run of {last + 1} step can't be stopped within; give it more steps")
    stops = range(1, last + 1) if stop_at is None else stop_at
    for stop in [stops] if isinstance(stops, int) else stops:
        if not 1 <= stop <= last:
            raise ValueError(
                f"stop_at must be within the run, from 1 to {last}, got {stop}; "
                f"the run has {last + 1} steps"
            )
        with TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            try:
                first = train(hooks, full, again=True, stop_after=stop, save_to=checkpoint)
                second = train(hooks, full, again=True, resume_from=checkpoint)
            except StateError as error:
                raise AssertionError(
                    f"{_names(straight)}: the state after step {stop} can't be saved and loaded: "
                    f"{error}"
                ) from error
        problems = [*seams(straight, first, second, ignored)]
        if problems:
            raise AssertionError(
                f"{_names(straight)}: a run that was stopped after step {stop} and resumed is not "
                "the run that never stopped:\n" + "\n".join(f"  {line}" for line in problems)
            )


def assert_weights_unchanged(hook: Hooks, **setting: Unpack[RunSetting]) -> None:
    """A run with the hook trains the very same weights as one without.

    That takes more than leaving the weights alone: a hook that draws from the global random
    generators changes the dropout, and whatever else the model and its loss draw.

    >>> from robo_orchard_lab.pipeline.hooks import ProgressBarHookConfig
    >>> assert_weights_unchanged(ProgressBarHookConfig(), steps=2)

    Args:
        hook: a configuration, or a function that makes the hook anew; or several of these.
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the message names the first step after which a weight differs, and which.
    """
    hooks, full = listed(hook), completed(setting)
    without, run = train([], full, again=True), train(hooks, full, again=True)
    for step, (expected, found) in enumerate(
        zip(without.weights_by_step, run.weights_by_step, strict=False)
    ):
        for name, problem in differences(found, expected):
            when = f"after step {step}" if step else "ahead of the first step"
            raise AssertionError(
                f"{_names(run)} changes the weights: {when}, {name} {problem}. To draw random "
                "numbers from torch's, NumPy's or Python's global generator changes them, too"
            )
    if run.progress != without.progress:
        raise AssertionError(
            f"{_names(run)} changes the run: it ended at {run.progress}, "
            f"without the hook at {without.progress}"
        )
    for name, expected_draw, found_draw in zip(
        ("torch", "NumPy", "Python"), without.drawn_next, run.drawn_next, strict=True
    ):
        if found_draw != expected_draw:
            raise AssertionError(
                f"{_names(run)} draws from {name}'s global random generator, which changes what a "
                "model draws from it; use a generator of its own"
            )


def assert_no_device_sync(hook: Hooks, *, allowed: int = 0, **setting: Unpack[RunSetting]) -> None:
    """A hook reads nothing from the device, which would wait for it.

    Counted is what :func:`count_host_reads` sees in a run with the hook, and not in one without.
    The trainer's reading at logging points and for saving is not counted.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> assert_no_device_sync(GradientClippingHookConfig(max_norm=1.0), steps=3)

    Args:
        hook: a configuration, or a function that makes the hook anew; or several of these.
        allowed: how many reads there may be in the run, for a hook that says when it reads.
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the message lists the lines that read, and how often they did.
    """
    hooks, full = listed(hook), completed(setting)
    without = train([], full, again=True, count_reads=True)
    run = train(hooks, full, again=True, count_reads=True)
    reads = _own_reads(run) - _own_reads(without)
    if reads.total() > allowed:
        lines = [f"  {count} x {read}" for read, count in reads.items()]
        raise AssertionError(
            f"{_names(run)} reads from tensors {reads.total()} times in "
            f"{run.progress.global_step_id} steps, expected at most {allowed}; each waits for the "
            "device. Publish tensors as they are: they are read together at logging points\n"
            + "\n".join(lines)
        )


def _own_reads(run: HookRun) -> Counter[str]:
    return Counter(str(read) for read in run.host_reads or () if not read.at_commit)


def _names(run: HookRun) -> str:
    names = ", ".join(repr(hook.name) for hook in run.hooks)
    return f"hook {names}" if len(run.hooks) == 1 else f"hooks {names}"
