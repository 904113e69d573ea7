"""Schedules that follow from the counters of the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.schedule.base import (
    STEP_CHANNELS,
    Due,
    Role,
    Schedule,
    ScheduleError,
)


@dataclass(frozen=True)
class EverySteps(Schedule):
    """With every n-th step (batch) of the run.

    On ``on_optimizer_step``, with those among them that end in an update.

    Raises:
        ScheduleError: n is not an int >= 1.
    """

    n: int
    channels: ClassVar = STEP_CHANNELS
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __post_init__(self) -> None:
        _check_count("EverySteps", self.n)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        n = self.n
        return lambda args: (args.run.progress.global_step_id + 1) % n == 0

    def __str__(self) -> str:
        return _counted(self.n, "step")


@dataclass(frozen=True)
class EveryOptimizerSteps(Schedule):
    """With every n-th committed update of the weights.

    Ahead of the update it is due where the n-th one is to come; after it, on
    ``on_optimizer_step``, only if the update was committed. One that is then skipped is asked for
    again with the next update.

    Raises:
        ScheduleError: n is not an int >= 1.
    """

    n: int
    channels: ClassVar = STEP_CHANNELS
    commit_channel: ClassVar[ChannelName] = "on_optimizer_step"

    def __post_init__(self) -> None:
        _check_count("EveryOptimizerSteps", self.n)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        n = self.n

        def due(args: PipelineHookArgs) -> bool:
            done = args.run.progress.optimizer_step_id
            if args.run.optimizer is None:
                return False  # there are no updates
            if args.update_committed is None:
                return args.at_accumulation_boundary and (done + 1) % n == 0
            return args.update_committed and done % n == 0

        return due

    def __str__(self) -> str:
        return _counted(self.n, "optimizer step")


@dataclass(frozen=True)
class EveryEpochs(Schedule):
    """With every n-th epoch; after it, only if the data was passed over to its end.

    On the channels of a step it is due in the last step of such an epoch, which only data with a
    length has known ahead. A run that is resumed in the middle of an epoch enters it again.

    Raises:
        ScheduleError: n is not an int >= 1; or, in the first step, the data has no length.
    """

    n: int
    channels: ClassVar = ("on_epoch", *STEP_CHANNELS)
    commit_channel: ClassVar[ChannelName] = "on_epoch"

    def __post_init__(self) -> None:
        _check_count("EveryEpochs", self.n)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        n = self.n
        if channel != "on_epoch":
            return _LastStepOfEpochs(self).due
        if role == "before":
            return lambda args: (args.run.progress.epoch_id + 1) % n == 0
        return lambda args: args.epoch_completed and (args.run.progress.epoch_id + 1) % n == 0

    def __str__(self) -> str:
        return _counted(self.n, "epoch")


@dataclass(frozen=True)
class AtSteps(Schedule):
    """With the steps of these numbers, the first step of the run being number 1.

    >>> print(AtSteps({100, 10}))
    at steps 10, 100

    Raises:
        ScheduleError: there is none, or one is not an int >= 1.
    """

    steps: frozenset[int]
    channels: ClassVar = STEP_CHANNELS
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __init__(self, steps: Iterable[int]) -> None:
        if not isinstance(steps, Iterable):
            raise ScheduleError(
                f"AtSteps needs the numbers of steps, such as {{10}}, got {steps!r}"
            )
        object.__setattr__(self, "steps", frozenset(steps))
        if not self.steps:
            raise ScheduleError("AtSteps needs at least one step")
        for step in self.steps:
            _check_count("AtSteps", step)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        steps = self.steps
        return lambda args: args.run.progress.global_step_id + 1 in steps

    def __str__(self) -> str:
        return f"at steps {', '.join(map(str, sorted(self.steps)))}"


@dataclass(frozen=True)
class First(Schedule):
    """With the first step of the run; with its first update, or epoch, on the channels of those.

    A resumed run is past its first step; one that is resumed in its first epoch enters that again.
    """

    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_step"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel == "on_epoch":
            if role == "before":
                return lambda args: args.run.progress.epoch_id == 0
            return lambda args: args.epoch_completed and args.run.progress.epoch_id == 0
        if channel == "on_optimizer_step":
            return _is_first_update
        return lambda args: args.run.progress.global_step_id == 0

    def __str__(self) -> str:
        return "first"


@dataclass(frozen=True)
class Last(Schedule):
    """With the step, or on ``on_epoch`` the epoch, in which the run reaches one of its limits.

    A run that a hook stops has no last step. Only the ``after`` of ``on_epoch`` always knows. What
    is asked earlier foresees it, from the length of the data where that is needed: with data
    without a length, and ``max_epoch`` alone, no step knows that it is the last. Where an update
    is then skipped, ``max_optimizer_step`` is reached later, and it is due again.
    """

    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_epoch"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel == "on_epoch":
            return _ends_in_epoch if role == "before" else _ended_in_epoch
        return _ends_in_step

    def __str__(self) -> str:
        return "last"


def _is_first_update(args: PipelineHookArgs) -> bool:
    progress = args.run.progress
    due = progress.optimizer_step_id + progress.skipped_optimizer_steps
    return due == (args.update_committed is not None)  # counted when it is over


class _LastStepOfEpochs:
    """Whether a step ends an epoch that is counted."""

    def __init__(self, schedule: EveryEpochs) -> None:
        self._schedule = schedule
        self._progress: TrainerProgress | None = None  # of the run that is known
        self._epoch_id = 0
        self._last_step: int | None = None  # of that epoch; None where it is not counted

    def due(self, args: PipelineHookArgs) -> bool:
        progress = args.run.progress
        if progress is not self._progress or progress.epoch_id != self._epoch_id:
            self._progress, self._epoch_id = progress, progress.epoch_id
            self._last_step = self._find_last_step(args)
        return progress.step_id == self._last_step

    def _find_last_step(self, args: PipelineHookArgs) -> int | None:
        length = args.run.steps_per_epoch
        if length is None:
            raise ScheduleError(
                f"{str(self._schedule)!r}: no step knows that it ends an epoch of data without a "
                "length; register the hook on on_epoch"
            )
        return length - 1 if (args.run.progress.epoch_id + 1) % self._schedule.n == 0 else None


def _ends_in_step(args: PipelineHookArgs) -> bool:
    progress, limits = args.run.progress, args.run.limits
    if limits.max_step is not None and progress.global_step_id + 1 >= limits.max_step:
        return True
    if args.update_committed is None:
        updates = progress.optimizer_step_id + args.at_accumulation_boundary
    else:
        updates = progress.optimizer_step_id
    if limits.max_optimizer_step is not None and updates >= limits.max_optimizer_step:
        return True
    return _is_last_epoch(args) and progress.step_id + 1 == args.run.steps_per_epoch


def _ends_in_epoch(args: PipelineHookArgs) -> bool:
    """Whether a limit will be reached in the epoch that begins, or goes on, now."""
    run, progress, limits = args.run, args.run.progress, args.run.limits
    if _is_last_epoch(args):
        return True
    batches = run.steps_per_epoch
    if batches is None:
        return False
    done, window = progress.step_id, run.accelerator.gradient_accumulation_steps
    ahead = TrainerProgress(
        global_step_id=progress.global_step_id + batches - done,
        optimizer_step_id=progress.optimizer_step_id + ceil(batches / window) - done // window,
    )
    return limits.reached(ahead)


def _ended_in_epoch(args: PipelineHookArgs) -> bool:
    completed = args.epoch_completed and _is_last_epoch(args)
    return completed or args.run.limits.reached(args.run.progress)


def _is_last_epoch(args: PipelineHookArgs) -> bool:
    max_epoch = args.run.limits.max_epoch
    return max_epoch is not None and args.run.progress.epoch_id + 1 >= max_epoch


def _check_count(name: str, n: object) -> None:
    if type(n) is not int or n < 1:
        raise ScheduleError(f"{name} needs an int >= 1, got {n!r}")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
