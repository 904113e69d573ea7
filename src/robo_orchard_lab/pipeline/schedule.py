"""When a hook runs, as data.

A schedule is decided from the counters of the run alone, so that a resumed run fires where the
straight one would; only :class:`EverySeconds` looks at a clock, that of the first rank, and tells
the others. Registering a hook with a schedule binds it to the hook's channel.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_lab.pipeline.batch_size import count_batches
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName

Due: TypeAlias = Callable[[PipelineHookArgs], bool]
"""Whether a hook runs now, asked once each time its channel is entered or left."""
Role: TypeAlias = Literal["before", "after"]
"""When it is asked: a hook that has a ``before`` asks there, also for its ``after``."""

STEP_CHANNELS: tuple[ChannelName, ...] = (
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
)


class ScheduleError(ValueError):
    """A schedule that can't be read, or that can never be due where it is to be used."""


class Schedule(ABC):
    """When a hook runs. Two are joined by ``|``: due when either is.

    >>> Schedule.parse("100 steps | 1 epoch") == EverySteps(100) | EveryEpochs(1)
    True
    >>> print(EveryOptimizerSteps(50) | EverySeconds(600))
    50 optimizer steps | 10 min

    Counted is what is done: ``EverySteps(100)`` is due in the step that brings their number to
    100, 200 and so on, in its ``before`` as in its ``after``. A field declared as a ``Schedule``
    takes one or its text, and is text in files.
    """

    channels: ClassVar[tuple[ChannelName, ...]]
    """Where it can be due."""
    commit_channel: ClassVar[ChannelName]
    """The channel on whose ``after`` it is exactly known whether it is due at the commit point."""

    @abstractmethod
    def due_on(self, channel: ChannelName, role: Role) -> Due:
        """The question to ask on one of :attr:`channels`."""

    def by_commit_channel(self) -> dict[ChannelName, Schedule]:
        """Its parts by the channel whose ``after`` knows best, for what acts at a commit point.

        >>> Schedule.parse("100 steps | 1 epoch").by_commit_channel()
        {'on_step': EverySteps(n=100), 'on_epoch': EveryEpochs(n=1)}
        """
        return {self.commit_channel: self}

    def bind(self, channel: ChannelName, role: Role) -> Due:
        """The question to ask on a channel.

        Raises:
            ScheduleError: it can never be due there; the message says where it can.
        """
        if channel not in self.channels:
            raise ScheduleError(
                f"{self} can never be due on {channel}; "
                f"register the hook on {' or '.join(self.channels)}"
            )
        return self.due_on(channel, role)

    @staticmethod
    def parse(text: str) -> Schedule:
        """The schedule that a text describes; ``str`` of it gives the text in its short form.

        ``100 steps``, ``50 optimizer steps``, ``1 epoch``, ``30 s``, ``10 min``, ``2 h``,
        ``at steps 10, 20``, ``first``, ``last``; several joined by ``|``.

        Raises:
            ScheduleError: with the part that can't be read, and what could stand there.
        """
        parts = [_parse_part(part.strip(), text) for part in text.split("|")]
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def __or__(self, other: Schedule) -> Schedule:
        if not isinstance(other, Schedule):
            return NotImplemented
        return AnyOf((*_members(self), *_members(other)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            as_schedule, serialization=core_schema.to_string_ser_schema()
        )


@dataclass(frozen=True)
class EverySteps(Schedule):
    """After every n-th step (batch) of the run.

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
            if args.update_committed is None:
                return args.at_accumulation_boundary and (done + 1) % n == 0
            return args.update_committed and done % n == 0

        return due

    def __str__(self) -> str:
        return _counted(self.n, "optimizer step")


@dataclass(frozen=True)
class EveryEpochs(Schedule):
    """With every n-th epoch; after it, only if the data was passed over to its end.

    Raises:
        ScheduleError: n is not an int >= 1.
    """

    n: int
    channels: ClassVar = ("on_epoch",)
    commit_channel: ClassVar[ChannelName] = "on_epoch"

    def __post_init__(self) -> None:
        _check_count("EveryEpochs", self.n)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        n = self.n
        if role == "before":
            return lambda args: (args.run.progress.epoch_id + 1) % n == 0
        return lambda args: args.epoch_completed and (args.run.progress.epoch_id + 1) % n == 0

    def __str__(self) -> str:
        return _counted(self.n, "epoch")


@dataclass(frozen=True)
class AtSteps(Schedule):
    """After steps of these numbers, the first step of the run being number 1.

    >>> print(AtSteps({100, 10}))
    at steps 10, 100

    Raises:
        ScheduleError: there is none, or one is not an int >= 1.
    """

    steps: frozenset[int]
    channels: ClassVar = STEP_CHANNELS
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __init__(self, steps: Iterable[int]) -> None:
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
    """With the first step of the run, or on ``on_epoch`` the first epoch; not after a resume."""

    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_step"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel == "on_epoch":
            if role == "before":
                return lambda args: args.run.progress.epoch_id == 0
            return lambda args: args.epoch_completed and args.run.progress.epoch_id == 0
        return lambda args: args.run.progress.global_step_id == 0

    def __str__(self) -> str:
        return "first"


@dataclass(frozen=True)
class Last(Schedule):
    """With the step, or on ``on_epoch`` the epoch, in which the run reaches one of its limits.

    A run that a hook stops has no last step. With ``max_epoch`` alone and data without a length,
    no step knows that it is the last; the epoch does, in its ``after``.
    """

    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_epoch"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel == "on_epoch":
            return _may_end_in_epoch if role == "before" else _ended_in_epoch
        return _ends_in_step

    def __str__(self) -> str:
        return "last"


@dataclass(frozen=True)
class EverySeconds(Schedule):
    """In the first step that ends s seconds or more after the last time, or after the start.

    The clock is that of the first rank. Others are told in a small exchange, which also says in
    how many steps to ask again: after about half of the time that is left. So it takes some ten
    exchanges each time, however long s is, and may come late by a hundredth of s and a step. The
    clock starts anew with a resumed run.

    Raises:
        ScheduleError: s is not a number > 0.
    """

    s: float
    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __post_init__(self) -> None:
        if isinstance(self.s, bool) or not isinstance(self.s, int | float) or not self.s > 0:
            raise ScheduleError(f"EverySeconds needs a number of seconds > 0, got {self.s!r}")
        if self.s == float("inf"):
            raise ScheduleError("EverySeconds needs a finite number of seconds; leave it out")
        object.__setattr__(self, "s", float(self.s))

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        return _AgreedClock(self.s).due

    def __str__(self) -> str:
        for unit, seconds in (("h", 3600.0), ("min", 60.0)):
            if self.s >= seconds and (self.s / seconds).is_integer():
                return f"{int(self.s / seconds)} {unit}"
        return f"{int(self.s)} s" if self.s.is_integer() else f"{self.s!r} s"


@dataclass(frozen=True)
class AnyOf(Schedule):
    """Due when one of several is; made by ``|``."""

    schedules: tuple[Schedule, ...]

    @property
    def channels(self) -> tuple[ChannelName, ...]:  # type: ignore[override]  # that of its parts
        """Where one of them can be due."""
        return tuple(dict.fromkeys(channel for part in self.schedules for channel in part.channels))

    def by_commit_channel(self) -> dict[ChannelName, Schedule]:
        parts: dict[ChannelName, Schedule] = {}
        for part in self.schedules:
            known = parts.get(part.commit_channel)
            parts[part.commit_channel] = part if known is None else known | part
        return parts

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        dues = [part.due_on(channel, role) for part in self.schedules if channel in part.channels]
        if len(dues) == 1:
            return dues[0]
        # All are asked: a clock has to be looked at on every rank alike.
        return lambda args: any([due(args) for due in dues])  # noqa: C419 - see above

    def __str__(self) -> str:
        return " | ".join(map(str, self.schedules))


class _AgreedClock:
    """Whether the time is up on the first rank's clock, known to all ranks."""

    _late = 0.01  # the share of the period by which it may be late, which bounds the exchanges

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._begun_at: float | None = None
        self._begun_step = 0
        self._ask_at_step = 0

    def due(self, args: PipelineHookArgs) -> bool:
        step = args.run.progress.steps_done
        if self._begun_at is None or step < self._begun_step:  # the run's start, or another run
            self._begin(step)
        accelerator = args.run.accelerator
        if accelerator is None or accelerator.num_processes == 1:
            assert self._begun_at is not None
            due = time.monotonic() - self._begun_at >= self._period_s
        elif step < self._ask_at_step:
            return False
        else:
            due, wait_steps = self._agree(accelerator, step)
            self._ask_at_step = step + wait_steps
        if due:
            self._begin(step)
        return due

    def _begin(self, step: int) -> None:
        self._begun_at = time.monotonic()
        self._begun_step = step

    def _agree(self, accelerator: Any, step: int) -> tuple[bool, int]:
        """What the first rank finds: whether it is time, and the steps until it is to be asked."""
        from accelerate.utils import broadcast

        assert self._begun_at is not None
        taken = time.monotonic() - self._begun_at
        left = self._period_s - taken
        due = left <= self._late * self._period_s
        steps_per_s = (step - self._begun_step) / taken if taken > 0 else 0.0
        wait = self._period_s if due else left
        found = torch.tensor([int(due), max(1, int(wait / 2 * steps_per_s))])
        # A collective, and waiting for the device.
        answer = broadcast(found.to(accelerator.device)).tolist()
        return bool(answer[0]), int(answer[1])


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
    return (
        limits.max_epoch is not None
        and progress.epoch_id + 1 >= limits.max_epoch
        and progress.step_id + 1 == count_batches(args.run.dataloader)
    )


def _may_end_in_epoch(args: PipelineHookArgs) -> bool:
    max_epoch = args.run.limits.max_epoch
    return max_epoch is not None and args.run.progress.epoch_id + 1 >= max_epoch


def _ended_in_epoch(args: PipelineHookArgs) -> bool:
    completed = args.epoch_completed and _may_end_in_epoch(args)
    return completed or args.run.limits.reached(args.run.progress)


_PATTERNS: tuple[tuple[str, Callable[[str], Schedule]], ...] = (
    (r"(\d+)\s*steps?", lambda n: EverySteps(int(n))),
    (r"(\d+)\s*optimizer[ _]steps?", lambda n: EveryOptimizerSteps(int(n))),
    (r"(\d+)\s*epochs?", lambda n: EveryEpochs(int(n))),
    (r"([\d.e+-]+)\s*(?:s|sec|seconds?)", lambda s: EverySeconds(float(s))),
    (r"([\d.e+-]+)\s*(?:min|minutes?)", lambda s: EverySeconds(float(s) * 60)),
    (r"([\d.e+-]+)\s*(?:h|hours?)", lambda s: EverySeconds(float(s) * 3600)),
    (r"at steps?\s+(\d+(?:\s*,\s*\d+)*)", lambda text: AtSteps(map(int, text.split(",")))),
    (r"(first)", lambda _: First()),
    (r"(last)", lambda _: Last()),
)


def _parse_part(part: str, text: str) -> Schedule:
    for pattern, make in _PATTERNS:
        found = re.fullmatch(pattern, part, re.IGNORECASE)
        if found:
            try:
                return make(found[1])
            except ScheduleError as error:
                raise ScheduleError(f"{part!r}: {error}") from None
            except ValueError:  # no number after all, such as 1.2.3
                break
    raise ScheduleError(
        f"can't read {part!r}"
        + (f" in {text!r}" if part != text else "")
        + " as a schedule; write '100 steps', '50 optimizer steps', '1 epoch', '30 s', '10 min', "
        "'2 h', 'at steps 10, 20', 'first' or 'last', several joined by '|'"
    )


def as_schedule(value: Any) -> Schedule:
    """A schedule as it is, or the one that a text describes.

    Raises:
        ScheduleError: it is neither, or can't be read.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return Schedule.parse(value)
    if isinstance(value, int) and not isinstance(value, bool):
        raise ScheduleError(f"{value} of what? write '{value} steps' or '{value} epochs'")
    raise ScheduleError(f"expected a schedule or its text, got {type(value).__name__}")


def _members(schedule: Schedule) -> tuple[Schedule, ...]:
    return schedule.schedules if isinstance(schedule, AnyOf) else (schedule,)


def _check_count(name: str, n: object) -> None:
    if type(n) is not int or n < 1:
        raise ScheduleError(f"{name} needs a number >= 1, got {n!r}")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
