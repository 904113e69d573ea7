"""When a hook runs, as data.

A schedule is decided from the counters of the run alone, so that a resumed run fires where the
straight one would; only :class:`EverySeconds` looks at a clock, that of the first rank, and tells
the others. Registering a hook with a schedule binds it to the hook's channel.
"""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from accelerate.utils import broadcast
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_lab.pipeline.batch_size import count_batches
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.progress import TrainerProgress

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
        return AnyOf((self, other))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            as_schedule,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
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
            if args.update_committed is None:
                return args.at_accumulation_boundary and (done + 1) % n == 0
            return args.update_committed and done % n == 0

        return due

    def __str__(self) -> str:
        return _counted(self.n, "optimizer step")


@dataclass(frozen=True)
class EveryEpochs(Schedule):
    """With every n-th epoch; after it, only if the data was passed over to its end.

    A run that is resumed in the middle of an epoch enters it again.

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
    """With the first step of the run, or on ``on_epoch`` the first epoch.

    A resumed run is past its first step; one that is resumed in its first epoch enters that again.
    """

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


@dataclass(frozen=True)
class EverySeconds(Schedule):
    """With the first step that is asked s seconds or more after the last time, or after the start.

    The start is the first time that it is asked, also in a resumed run. The clock is that of the
    first rank. Others are told in a small exchange, which also says in how many steps to ask
    again: after about half of the time that is left. So it takes some ten exchanges each time,
    however long s is, and may come late by a hundredth of s and a step; later, where steps begin
    to take longer.

    Raises:
        ScheduleError: s is not a finite number > 0.
    """

    s: float
    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __post_init__(self) -> None:
        if isinstance(self.s, bool) or not isinstance(self.s, int | float) or not self.s > 0:
            raise ScheduleError(f"EverySeconds needs a number of seconds > 0, got {self.s!r}")
        if not self.s <= sys.float_info.max:
            raise ScheduleError(
                f"EverySeconds needs a finite number of seconds, got {self.s!r:.60}; for never, "
                "leave the schedule out"
            )
        object.__setattr__(self, "s", float(self.s))

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        return _AgreedClock(self.s).due

    def __str__(self) -> str:
        for unit, seconds in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
            count = self.s / seconds
            if count >= 1 and count.is_integer() and count * seconds == self.s:
                return f"{int(count)} {unit}"
        return f"{self.s!r} s"


@dataclass(frozen=True)
class AnyOf(Schedule):
    """Due when one of several is; made by ``|``.

    Raises:
        ScheduleError: there are fewer than two.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        flat: list[Schedule] = []
        for part in self.schedules:
            flat += part.schedules if isinstance(part, AnyOf) else (part,)
        if len(flat) < 2:
            raise ScheduleError(f"AnyOf needs two schedules or more, got {len(flat)}")
        object.__setattr__(self, "schedules", tuple(flat))

    @property
    def channels(self) -> tuple[ChannelName, ...]:  # type: ignore[override]  # that of its parts
        """Where each of them can be due."""
        first, *others = self.schedules
        return tuple(c for c in first.channels if all(c in other.channels for other in others))

    def bind(self, channel: ChannelName, role: Role) -> Due:
        for part in self.schedules:
            if channel not in part.channels:
                raise ScheduleError(
                    f"{str(part)!r} in {str(self)!r} can never be due on {channel}, only on "
                    f"{' or '.join(part.channels)}; register the hook on several channels, each "
                    "with its part, or what makes requests by register_at_commit"
                )
        return self.due_on(channel, role)

    def by_commit_channel(self) -> dict[ChannelName, Schedule]:
        parts: dict[ChannelName, Schedule] = {}
        for part in self.schedules:
            known = parts.get(part.commit_channel)
            parts[part.commit_channel] = part if known is None else known | part
        return parts

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        dues = [part.due_on(channel, role) for part in self.schedules]
        # All are asked: a clock has to be looked at on every rank alike.
        return lambda args: any([due(args) for due in dues])  # noqa: C419 - see above

    def __str__(self) -> str:
        return " | ".join(map(str, self.schedules))


_MANY_STEPS = 1 << 31


class _AgreedClock:
    """Whether the time is up on the first rank's clock, known to all ranks."""

    _late = 0.01  # the share of the period by which it may be late, which bounds the exchanges

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._progress: TrainerProgress | None = None  # of the run that the clock was started in
        self._begun_at = 0.0
        self._begun_step = 0
        self._ask_at_step = 0

    def due(self, args: PipelineHookArgs) -> bool:
        if args.exception is not None:
            return False  # the other ranks may never come here, to answer
        progress = args.run.progress
        step = progress.steps_done
        if progress is not self._progress:
            self._progress = progress
            self._ask_at_step = 0
            self._begin(step)
        accelerator = args.run.accelerator
        if accelerator is None or accelerator.num_processes == 1:
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
        taken = time.monotonic() - self._begun_at
        left = self._period_s - taken
        due = left <= self._late * self._period_s
        steps_per_s = (step - self._begun_step) / taken if taken > 0 else 0.0
        wait = self._period_s if due else left
        wait_steps = min(max(1, wait / 2 * steps_per_s), _MANY_STEPS)
        found = torch.tensor([int(due), int(wait_steps)])
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
    return _is_last_epoch(args) and progress.step_id + 1 == count_batches(args.run.dataloader)


def _ends_in_epoch(args: PipelineHookArgs) -> bool:
    """Whether a limit will be reached in the epoch that begins, or goes on, now."""
    run, progress, limits = args.run, args.run.progress, args.run.limits
    if _is_last_epoch(args):
        return True
    batches = count_batches(run.dataloader)
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


def _check_count(name: str, n: object) -> None:
    if type(n) is not int or n < 1:
        raise ScheduleError(f"{name} needs an int >= 1, got {n!r}")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
