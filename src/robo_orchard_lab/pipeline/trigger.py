"""When a hook runs, as data.

A trigger is decided from the counters of the run alone, so that a resumed run fires where the
straight one would; only :class:`EverySeconds` looks at a clock, that of the first rank, and tells
the others. Registering a hook with a trigger binds it to the hook's channel.
"""

from __future__ import annotations

import math
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.progress import ChannelName, TrainerProgress

# --- duration --------------------------------------------------------------------------------
# A length of time, as a number of seconds and as text.


_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_UNITS = re.compile(
    r"(?:(?P<d>[\d.]+)\s*(?:d|days?))?\s*(?:(?P<h>[\d.]+)\s*(?:h|hours?))?\s*"
    r"(?:(?P<m>[\d.]+)\s*(?:m|min|minutes?))?\s*(?:(?P<s>[\d.]+)\s*(?:s|sec|seconds?))?"
)
_CLOCK = re.compile(r"(?:(?P<d>\d+)-(?=\d+:\d+:))?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)")


def duration_s(value: Any) -> float:
    """The seconds of a duration: a number of them, or a text.

    >>> duration_s("3h30min"), duration_s("1 d 2 h"), duration_s("90 s"), duration_s(2.5)
    (12600.0, 93600.0, 90.0, 2.5)
    >>> duration_s("1-02:00:00"), duration_s("1:30:00"), duration_s("05:00")  # as SLURM writes it
    (93600.0, 5400.0, 300.0)

    Raises:
        ValueError: it is neither, not finite, or less than 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected seconds or a text such as '3h30min', got {value!r:.60}")
    try:
        seconds = _from_text(value.strip().lower()) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        raise ValueError(
            f"can't read {value!r:.60} as a length of time; write '3h30min', '90 s', '1:30:00' or "
            "a number of seconds"
        ) from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"expected a finite length of time >= 0, got {value!r:.60}")
    return seconds


def _from_text(text: str) -> float:
    found = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    parts = {} if found is None else {k: v for k, v in found.groupdict().items() if v is not None}
    if not parts:
        return float(text)
    return float(sum(float(count) * _SECONDS[unit] for unit, count in parts.items()))


DurationField: TypeAlias = Annotated[float | str, BeforeValidator(duration_s)]
"""How a configuration declares a duration: given as seconds or text, and held as seconds."""


# --- base ------------------------------------------------------------------------------------
# What a trigger is.


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


class TriggerError(ValueError):
    """A trigger that can't be read, or that can never be due where it is to be used."""


class Trigger(ABC):
    """When a hook runs. Two are joined by ``|``: due when either is.

    >>> from robo_orchard_lab.pipeline import trigger
    >>> text = "100 steps | 1 epoch"
    >>> Trigger.parse(text) == trigger.EverySteps(100) | trigger.EveryEpochs(1)
    True
    >>> print(trigger.EveryOptimizerSteps(50) | trigger.EverySeconds(600))
    50 optimizer steps | 10 min

    Counted is what is done: ``EverySteps(100)`` is due in the step that brings their number to
    100, 200 and so on, in its ``before`` as in its ``after``. A field that is declared as a
    :data:`TriggerField` takes one or its text, and is text in files.
    """

    channels: ClassVar[tuple[ChannelName, ...]]
    """Where it can be due."""
    commit_channel: ClassVar[ChannelName]
    """The channel on whose ``after`` it is exactly known whether it is due at the commit point."""

    @abstractmethod
    def due_on(self, channel: ChannelName, role: Role) -> Due:
        """The question to ask on one of :attr:`channels`."""

    def by_commit_channel(self) -> dict[ChannelName, Trigger]:
        """Its parts by the channel whose ``after`` knows best, for what acts at a commit point.

        >>> Trigger.parse("100 steps | 1 epoch").by_commit_channel()
        {'on_step': EverySteps(n=100), 'on_epoch': EveryEpochs(n=1)}
        """
        return {self.commit_channel: self}

    def bind(self, channel: ChannelName, role: Role) -> Due:
        """The question to ask on a channel.

        Raises:
            TriggerError: it can never be due there; the message says where it can.
        """
        if channel not in self.channels:
            raise TriggerError(
                f"{self} can never be due on {channel}; "
                f"register the hook on {' or '.join(self.channels)}"
            )
        return self.due_on(channel, role)

    @staticmethod
    def parse(text: str) -> Trigger:
        """The trigger that a text describes; ``str`` of it gives the text in its short form.

        ``100 steps``, ``50 optimizer steps``, ``1 epoch``, ``30 s``, ``10 min``, ``2 h``,
        ``at steps 10, 20``, ``first``, ``last``; several joined by ``|``.

        Raises:
            TriggerError: with the part that can't be read, and what could stand there.
        """

        return parse(text)

    def __or__(self, other: Trigger) -> Trigger:
        if not isinstance(other, Trigger):
            return NotImplemented
        return AnyOf((self, other))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            as_trigger,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
        )


@dataclass(frozen=True)
class AnyOf(Trigger):
    """Due when one of several is; made by ``|``.

    Raises:
        TriggerError: there are fewer than two.
    """

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        flat: list[Trigger] = []
        for part in self.triggers:
            flat += part.triggers if isinstance(part, AnyOf) else (part,)
        if len(flat) < 2:
            raise TriggerError(f"AnyOf needs two triggers or more, got {len(flat)}")
        object.__setattr__(self, "triggers", tuple(flat))

    @property
    def channels(self) -> tuple[ChannelName, ...]:  # type: ignore[override]  # that of its parts
        """Where each of them can be due."""
        first, *others = self.triggers
        return tuple(c for c in first.channels if all(c in other.channels for other in others))

    def bind(self, channel: ChannelName, role: Role) -> Due:
        for part in self.triggers:
            if channel not in part.channels:
                raise TriggerError(
                    f"{str(part)!r} in {str(self)!r} can never be due on {channel}, only on "
                    f"{' or '.join(part.channels)}; register the hook on several channels, each "
                    "with its part, or what makes requests by register_at_commit"
                )
        return self.due_on(channel, role)

    def by_commit_channel(self) -> dict[ChannelName, Trigger]:
        parts: dict[ChannelName, Trigger] = {}
        for part in self.triggers:
            known = parts.get(part.commit_channel)
            parts[part.commit_channel] = part if known is None else known | part
        return parts

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        dues = [part.due_on(channel, role) for part in self.triggers]
        # All are asked: a clock has to be looked at on every rank alike.
        return lambda args: any([due(args) for due in dues])  # noqa: C419 - see above

    def __str__(self) -> str:
        return " | ".join(map(str, self.triggers))


def as_trigger(value: Any) -> Trigger:
    """A trigger as it is, or the one that a text describes.

    Raises:
        TriggerError: it is neither, or can't be read.
    """
    if isinstance(value, Trigger):
        return value
    if isinstance(value, str):
        return Trigger.parse(value)
    if isinstance(value, int) and not isinstance(value, bool):
        raise TriggerError(f"{value} of what? write '{value} steps' or '{value} epochs'")
    raise TriggerError(f"expected a trigger or its text, got {type(value).__name__}")


class _AsText:
    """What JSON Schema says of a field."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:

        return JSON_SCHEMA.copy()


TriggerField: TypeAlias = Annotated[Trigger | str, BeforeValidator(as_trigger), _AsText()]
"""Annotation of a config field that holds a trigger; accepts a trigger or its text."""

# The names under which hooks written before the rename import these two.
Schedule = Trigger
ScheduleField = TriggerField


# --- counted ---------------------------------------------------------------------------------
# Schedules that follow from the counters of the run.


@dataclass(frozen=True)
class EverySteps(Trigger):
    """With every n-th step (batch) of the run.

    On ``on_optimizer_step``, with those among them that end in an update.

    Raises:
        TriggerError: n is not an int >= 1.
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
class EveryOptimizerSteps(Trigger):
    """With every n-th committed update of the weights.

    Ahead of the update it is due where the n-th one is to come; after it, on
    ``on_optimizer_step``, only if the update was committed. One that is then skipped is asked for
    again with the next update.

    Raises:
        TriggerError: n is not an int >= 1.
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
class EveryEpochs(Trigger):
    """With every n-th epoch; after it, only if the data was passed over to its end.

    On the channels of a step it is due in the last step of such an epoch, which only data with a
    length has known ahead. A run that is resumed in the middle of an epoch enters it again.

    Raises:
        TriggerError: n is not an int >= 1; or, in the first step, the data has no length.
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
class AtSteps(Trigger):
    """With the steps of these numbers, the first step of the run being number 1.

    >>> print(AtSteps({100, 10}))
    at steps 10, 100

    Raises:
        TriggerError: there is none, or one is not an int >= 1.
    """

    steps: frozenset[int]
    channels: ClassVar = STEP_CHANNELS
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __init__(self, steps: Iterable[int]) -> None:
        if not isinstance(steps, Iterable):
            raise TriggerError(f"AtSteps needs the numbers of steps, such as {{10}}, got {steps!r}")
        object.__setattr__(self, "steps", frozenset(steps))
        if not self.steps:
            raise TriggerError("AtSteps needs at least one step")
        for step in self.steps:
            _check_count("AtSteps", step)

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        steps = self.steps
        return lambda args: args.run.progress.global_step_id + 1 in steps

    def __str__(self) -> str:
        return f"at steps {', '.join(map(str, sorted(self.steps)))}"


@dataclass(frozen=True)
class First(Trigger):
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
class Last(Trigger):
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

    def __init__(self, trigger: EveryEpochs) -> None:
        self._trigger = trigger
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
            raise TriggerError(
                f"{str(self._trigger)!r}: no step knows that it ends an epoch of data without a "
                "length; register the hook on on_epoch"
            )
        return length - 1 if (args.run.progress.epoch_id + 1) % self._trigger.n == 0 else None


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
        raise TriggerError(f"{name} needs an int >= 1, got {n!r}")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- clock -----------------------------------------------------------------------------------
# A trigger that follows from the time.


@dataclass(frozen=True)
class EverySeconds(Trigger):
    """With the first step that is asked s seconds or more after the last time, or after the start.

    The start is the first time that it is asked, also in a resumed run. The clock is that of the
    first rank. Others learn from it in the run's exchanges (:class:`Agreement`), one of which is
    due after about half of the time that is left. So it takes some ten of them each time, however
    long s is, and may be early by a hundredth of s, and late by a step or two; later, where steps
    begin to take longer, or where exchanges are to be further apart.

    Raises:
        TriggerError: s is not a finite number > 0.
    """

    s: float
    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")
    commit_channel: ClassVar[ChannelName] = "on_step"

    def __post_init__(self) -> None:
        if isinstance(self.s, bool) or not isinstance(self.s, int | float) or not self.s > 0:
            raise TriggerError(f"EverySeconds needs a number of seconds > 0, got {self.s!r}")
        if not self.s <= sys.float_info.max:
            raise TriggerError(
                f"EverySeconds needs a finite number of seconds, got {self.s!r:.60}; for never, "
                "leave the trigger out"
            )
        object.__setattr__(self, "s", float(self.s))

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        return _AgreedClock(self.s, str(self)).due

    def __str__(self) -> str:
        for unit, seconds in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
            count = self.s / seconds
            if count >= 1 and count.is_integer() and count * seconds == self.s:
                return f"{int(count)} {unit}"
        return f"{self.s!r} s"


class _AgreedClock:
    """Whether the time is up on the first rank's clock, known to all ranks."""

    _early = 0.01  # the share of the period by which it may be early, which bounds the exchanges

    def __init__(self, period_s: float, name: str) -> None:
        self._period_s = period_s
        self._name = name
        self._run: PipelineRun | None = None  # that the clock was started in
        self._begun_at = 0.0
        self._rings = False  # as the ranks have agreed

    def due(self, args: PipelineHookArgs) -> bool:
        if args.exception is not None:
            return False  # whoever hears it has something else to do
        run = args.run
        if run is not self._run:
            self._begin(run)
        due = self._rings if run.agreement.several else self._left_s() <= 0
        if due:
            self._rings, self._begun_at = False, time.monotonic()
        return due

    def _begin(self, run: PipelineRun) -> None:
        self._run, self._rings, self._begun_at = run, False, time.monotonic()
        if run.agreement.several:
            run.agreement.topic(
                f"every {self._name}",
                find=self._is_up,
                tell=self._ring,
                whose="first",
                wait_s=self._wait_s,
            )

    def _ring(self, up: int) -> None:
        self._rings = True

    def _is_up(self) -> bool:
        return not self._rings and self._left_s() <= self._early * self._period_s

    def _wait_s(self) -> float:
        return (self._period_s if self._rings or self._is_up() else self._left_s()) / 2

    def _left_s(self) -> float:
        return self._period_s - (time.monotonic() - self._begun_at)


# --- text ------------------------------------------------------------------------------------
# The short text of a trigger.


def parse(text: str) -> Trigger:
    """The trigger that a text describes; see :meth:`Trigger.parse`."""
    parts = [_parse_part(part.strip(), text) for part in text.split("|")]
    return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))


_PATTERNS: tuple[tuple[str, Callable[[str], Trigger]], ...] = (
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


_ANY_PART = rf"\s*(?:{'|'.join(pattern for pattern, _ in _PATTERNS)})\s*"
_KINDS = (
    "'100 steps', '50 optimizer steps', '1 epoch', '30 s', '10 min', '2 h', 'at steps 10, 20', "
    "'first' or 'last', several joined by '|'"
)
JSON_SCHEMA = {
    "type": "string",
    "pattern": rf"^{_ANY_PART}(?:\|{_ANY_PART})*$",  # which has no way to say: in either case
    "examples": ["100 steps | 1 epoch", "50 optimizer steps", "10 min", "at steps 10, 20", "last"],
    "patternErrorMessage": f"write {_KINDS}",  # which editors show
}
"""What JSON Schema says of the text of a trigger."""


def _parse_part(part: str, text: str) -> Trigger:
    for pattern, make in _PATTERNS:
        found = re.fullmatch(pattern, part, re.IGNORECASE)
        if found:
            try:
                return make(found[1])
            except TriggerError as error:
                raise TriggerError(f"{part!r}: {error}") from None
            except ValueError:  # no number after all, such as 1.2.3
                break
    raise TriggerError(
        f"can't read {part!r:.80}"
        + (f" in {text!r:.80}" if part != text else "")
        + f" as a trigger; write {_KINDS}"
    )


__all__ = [
    "STEP_CHANNELS",
    "AnyOf",
    "AtSteps",
    "Due",
    "EveryEpochs",
    "EveryOptimizerSteps",
    "EverySeconds",
    "EverySteps",
    "First",
    "Last",
    "Role",
    "Trigger",
    "TriggerError",
    "TriggerField",
    "as_trigger",
]
