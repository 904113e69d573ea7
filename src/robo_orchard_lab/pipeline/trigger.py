"""Triggers: when a hook runs, as data.

A trigger depends only on the counters of the run, so a resumed run fires at the same steps as an
uninterrupted run. The exception is :class:`EverySeconds`, which follows the clock of rank 0.
Registering a hook with a trigger binds the trigger to a channel.
"""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName, remaining_steps

Due: TypeAlias = Callable[[PipelineHookArgs], bool]
"""Function that returns True if a hook runs now; called once per entry or exit of its channel."""
Role: TypeAlias = Literal["before", "after"]
"""Where the trigger is evaluated: a hook with a ``before`` evaluates there, also for its
``after``."""

STEP_CHANNELS: tuple[ChannelName, ...] = CHANNEL_NAMES[2:7]


class TriggerError(ValueError):
    """Error for an invalid trigger text, or a trigger never due on its channel."""


class Trigger(ABC):
    """Rule for when a hook runs; ``|`` joins triggers.

    >>> from robo_orchard_lab.pipeline import trigger
    >>> text = "100 steps | 1 epoch"
    >>> Trigger.parse(text) == trigger.EverySteps(100) | trigger.EveryEpochs(1)
    True
    >>> print(trigger.EveryOptimizerSteps(50) | trigger.EverySeconds(600))
    50 optimizer steps | 10 min

    ``EverySteps(100)`` is due in the step that brings the number of steps to 100, 200 and so on.
    ``EverySteps(100, start=0)``, or "100 steps from 0", is due in the steps whose
    ``args.global_step_id`` is 0, 100, 200 and so on. A config field declared as
    :data:`TriggerField` accepts a trigger or its text.
    """

    channels: ClassVar[tuple[ChannelName, ...]] = STEP_CHANNELS
    """Channels on which the trigger can be due."""
    commit_channel: ClassVar[ChannelName] = "on_step"
    """Channel whose ``after`` knows exactly if the trigger is due at the next commit point."""

    @abstractmethod
    def due_on(self, channel: ChannelName, role: Role) -> Due:
        """Return the function to evaluate on one of :attr:`channels`."""

    def parts(self) -> tuple[Trigger, ...]:
        """Return the triggers joined by ``|``, or this trigger."""
        return (self,)

    def by_commit_channel(self) -> dict[ChannelName, Trigger]:
        """Split the trigger by :attr:`commit_channel`.

        >>> Trigger.parse("100 steps | 1 epoch").by_commit_channel()
        {'on_step': EverySteps(n=100), 'on_epoch': EveryEpochs(n=1)}
        """
        found: dict[ChannelName, Trigger] = {}
        for part in self.parts():
            known = found.get(part.commit_channel)
            found[part.commit_channel] = part if known is None else known | part
        return found

    def bind(self, channel: ChannelName, role: Role) -> Due:
        """Return the function to evaluate on a channel.

        Raises:
            TriggerError: the trigger is never due there; the message lists its channels.
        """
        for part in self.parts():
            if channel not in part.channels:
                channels = " or ".join(part.channels)
                if part is self:
                    raise TriggerError(
                        f"{self} can never be due on {channel}; register the hook on {channels}"
                    )
                raise TriggerError(
                    f"{str(part)!r} in {str(self)!r} can never be due on {channel}, only on "
                    f"{channels}; register the hook once per part, or with register_at_commit if "
                    "it makes requests"
                )
        return self.due_on(channel, role)

    @staticmethod
    def parse(text: str) -> Trigger:
        """Parse a text; ``str(trigger)`` returns its short form.

        ``100 steps``, ``100 steps from 0``, ``50 optimizer steps``, ``1 epoch``, ``30 s``,
        ``10 min``, ``2 h``, ``at steps 10, 20``, ``first``, ``last``; several joined by ``|``.

        Raises:
            TriggerError: with the part that can't be parsed, and examples.
        """
        parts = [_parse_part(part.strip(), text) for part in text.split("|")]
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def __or__(self, other: Trigger) -> Trigger:
        return AnyOf((self, other)) if isinstance(other, Trigger) else NotImplemented

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            as_trigger,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
        )


@dataclass(frozen=True)
class AnyOf(Trigger):
    """Trigger due when any of several triggers is due; the result of ``|``.

    Raises:
        TriggerError: there are fewer than two triggers.
    """

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        flat = tuple(part for trigger in self.triggers for part in trigger.parts())
        if len(flat) < 2:
            raise TriggerError(f"AnyOf needs two triggers or more, got {len(flat)}")
        object.__setattr__(self, "triggers", flat)

    def parts(self) -> tuple[Trigger, ...]:
        return self.triggers

    @property
    def channels(self) -> tuple[ChannelName, ...]:  # type: ignore[override]  # depends on the parts
        """Channels common to all parts."""
        first, *others = self.triggers
        return tuple(c for c in first.channels if all(c in other.channels for other in others))

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        dues = [part.due_on(channel, role) for part in self.triggers]
        # Evaluate all: every rank must read a clock at the same steps.
        return lambda args: any([due(args) for due in dues])  # noqa: C419 - see above

    def __str__(self) -> str:
        return " | ".join(map(str, self.triggers))


def as_trigger(value: Any) -> Trigger:
    """Return a trigger unchanged, or parse its text.

    Raises:
        TriggerError: the value is neither a trigger nor a valid text.
    """
    if isinstance(value, Trigger):
        return value
    if isinstance(value, str):
        return Trigger.parse(value)
    if isinstance(value, int) and not isinstance(value, bool):
        raise TriggerError(f"{value} of what? write '{value} steps' or '{value} epochs'")
    raise TriggerError(f"expected a trigger or its text, got {type(value).__name__}")


@dataclass(frozen=True, repr=False)
class _EveryN(Trigger):
    n: int
    """Period, an int >= 1."""
    start: int | None = None
    """First id that the trigger is due at, an int >= 0; None for n - 1, the n-th from the start."""
    _noun: ClassVar[str]

    def __post_init__(self) -> None:
        _check_count(type(self).__name__, self.n)
        if self.start is not None and (type(self.start) is not int or self.start < 0):
            raise TriggerError(
                f"{type(self).__name__} needs an int >= 0 to start from, got {self.start!r}"
            )

    @property
    def first(self) -> int:
        """Id of the first step, update or epoch that the trigger is due at, from 0."""
        return self.n - 1 if self.start is None else self.start

    def _is_due(self, number: int) -> bool:
        return number >= self.first and (number - self.first) % self.n == 0

    def __str__(self) -> str:
        text = f"{self.n} {self._noun}{'' if self.n == 1 else 's'}"
        return text if self.start is None else f"{text} from {self.start}"

    def __repr__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"{type(self).__name__}(n={self.n}{start})"


@dataclass(frozen=True, repr=False)
class EverySteps(_EveryN):
    """Every n-th step (batch) of the run; on ``on_optimizer_step``, only steps with an update.

    >>> [step for step in range(250) if EverySteps(100, start=0)._is_due(step)]
    [0, 100, 200]
    """

    _noun: ClassVar[str] = "step"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        n, first = self.n, self.first  # read once: a step calls this for each hook

        def due(args: PipelineHookArgs) -> bool:
            step = args._run.progress.global_step_id
            return (step - first) % n == 0 and step >= first

        return due


@dataclass(frozen=True, repr=False)
class EveryOptimizerSteps(_EveryN):
    """Every n-th committed weight update.

    Before the update, the trigger is due if the update would be the n-th; after it, only if it was
    committed. After a skipped update the trigger is due again in the next one.
    """

    commit_channel: ClassVar[ChannelName] = "on_optimizer_step"
    _noun: ClassVar[str] = "optimizer step"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        def due(args: PipelineHookArgs) -> bool:
            done = args.run.progress.optimizer_step_id
            if not args.run.optimizers:
                return False
            if args.update_committed is None:
                named = args._named
                done -= named is not None and named.is_counted
                return args.at_accumulation_boundary and self._is_due(done)
            return args.update_committed and self._is_due(done - 1)

        return due


@dataclass(frozen=True, repr=False)
class EveryEpochs(_EveryN):
    """Every n-th epoch; in its ``after``, only if the epoch was completed.

    On step channels the trigger is due in the last step of the epoch, which requires data with a
    length. A run that resumes inside an epoch enters the epoch again.

    Raises:
        TriggerError: in the first step, if the data has no length.
    """

    channels: ClassVar = ("on_epoch", *STEP_CHANNELS)
    commit_channel: ClassVar[ChannelName] = "on_epoch"
    _noun: ClassVar[str] = "epoch"

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel != "on_epoch":
            return self._is_last_step
        if role == "before":
            return lambda args: self._is_due(args.run.progress.epoch_id)
        return lambda args: args.epoch_completed and self._is_due(args.run.progress.epoch_id)

    def _is_last_step(self, args: PipelineHookArgs) -> bool:
        progress, length = args.run.progress, args.run.steps_per_epoch
        if length is None:
            raise TriggerError(
                f"{str(self)!r}: no step can be the last of an epoch of unknown length; "
                "register the hook on on_epoch"
            )
        return progress.step_id + 1 == length and self._is_due(progress.epoch_id)


@dataclass(frozen=True)
class AtSteps(Trigger):
    """Steps with given numbers; the first step of the run is number 1.

    >>> print(AtSteps({100, 10}))
    at steps 10, 100

    Raises:
        TriggerError: there is no number, or one is not an int >= 1.
    """

    steps: frozenset[int]

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
        return lambda args: args._run.progress.global_step_id + 1 in steps

    def __str__(self) -> str:
        return f"at steps {', '.join(map(str, sorted(self.steps)))}"


@dataclass(frozen=True)
class First(Trigger):
    """First step of the run; on the channels of updates and epochs, the first of these.

    A run that resumes inside its first epoch enters that epoch again.
    """

    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")

    def due_on(self, channel: ChannelName, role: Role) -> Due:
        if channel == "on_epoch":
            if role == "before":
                return lambda args: args.run.progress.epoch_id == 0
            return lambda args: args.epoch_completed and args.run.progress.epoch_id == 0
        if channel == "on_optimizer_step":
            return _is_first_update
        return lambda args: args._run.progress.global_step_id == 0

    def __str__(self) -> str:
        return "first"


@dataclass(frozen=True)
class Last(Trigger):
    """Step, or on ``on_epoch`` the epoch, in which the run reaches a limit.

    Only the ``after`` of ``on_epoch`` always knows. Others predict the end from the length of the
    data, and are due again if a predicted update is skipped. Without a length, ``max_epoch`` alone
    has no last step; neither has a run that a hook stops.
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
    return due == (args.update_committed is not None)  # the counters advance with the update


def _ends_in_step(args: PipelineHookArgs) -> bool:
    progress, limits = args.run.progress, args.run.limits
    if limits.max_step is not None and progress.global_step_id + 1 >= limits.max_step:
        return True
    updates = progress.optimizer_step_id
    if args.update_committed is None:
        updates += args.at_accumulation_boundary
    if limits.max_optimizer_step is not None and updates >= limits.max_optimizer_step:
        return True
    return _is_last_epoch(args) and progress.step_id + 1 == args.run.steps_per_epoch


def _ends_in_epoch(args: PipelineHookArgs) -> bool:
    """Return True if the current epoch is predicted to reach a limit."""
    run, batches = args.run, args.run.steps_per_epoch
    if _is_last_epoch(args) or batches is None:
        return _is_last_epoch(args)
    window = run.accelerator.gradient_accumulation_steps
    left = remaining_steps(run.limits, run.progress, batches, window)
    return left is not None and left <= batches - run.progress.step_id


def _ended_in_epoch(args: PipelineHookArgs) -> bool:
    completed = args.epoch_completed and _is_last_epoch(args)
    return completed or args.run.limits.reached(args.run.progress)


def _is_last_epoch(args: PipelineHookArgs) -> bool:
    max_epoch = args.run.limits.max_epoch
    return max_epoch is not None and args.run.progress.epoch_id + 1 >= max_epoch


def _check_count(name: str, n: object) -> None:
    if type(n) is not int or n < 1:
        raise TriggerError(f"{name} needs an int >= 1, got {n!r}")


@dataclass(frozen=True)
class EverySeconds(Trigger):
    """First step at least s seconds after the previous time, by the clock of rank 0.

    The clock starts at the first evaluation, also in a resumed run. Other ranks learn of the time
    in the exchanges of :class:`Agreement`, about ten per period. The trigger may be early by 1 % of
    s and late by two steps, or more with rare exchanges.

    Raises:
        TriggerError: s is not a finite number > 0.
    """

    s: float
    channels: ClassVar = (*STEP_CHANNELS, "on_epoch")

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
        return _RankZeroClock(self.s, str(self)).due

    def __str__(self) -> str:
        for unit, seconds in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
            count = self.s / seconds
            if count >= 1 and count.is_integer() and count * seconds == self.s:
                return f"{int(count)} {unit}"
        return f"{self.s!r} s"


class _RankZeroClock:
    """Timer of rank 0 whose expiry all ranks see at the same step."""

    _early = 0.01  # share of the period; bounds the number of exchanges

    def __init__(self, period_s: float, name: str) -> None:
        self._period_s = period_s
        self._name = name
        self._run: PipelineRun | None = None  # the run that started the clock
        self._started_at = 0.0
        self._expired = False  # as agreed by all ranks

    def due(self, args: PipelineHookArgs) -> bool:
        if args.exception is not None:
            return False  # a failing rank must not enter an exchange
        run = args.run
        if run is not self._run:
            self._start(run)
        due = self._expired if run.agreement.several else self._remaining_s() <= 0
        if due:
            self._expired, self._started_at = False, time.monotonic()
        return due

    def _start(self, run: PipelineRun) -> None:
        self._run, self._expired, self._started_at = run, False, time.monotonic()
        if run.agreement.several:
            run.agreement.topic(
                f"every {self._name}",
                find=self._is_up,
                tell=self._expire,
                whose="first",
                wait_s=self._wait_s,
            )

    def _expire(self, up: int) -> None:
        self._expired = True

    def _is_up(self) -> bool:
        return not self._expired and self._remaining_s() <= self._early * self._period_s

    def _wait_s(self) -> float:
        return (self._period_s if self._expired or self._is_up() else self._remaining_s()) / 2

    def _remaining_s(self) -> float:
        return self._period_s - (time.monotonic() - self._started_at)


_FROM = r"(?:\s+from\s+(\d+))?"


def _every(cls: type[_EveryN]) -> Callable[..., Trigger]:
    return lambda n, start: cls(int(n), None if start is None else int(start))


_PATTERNS: tuple[tuple[str, Callable[..., Trigger]], ...] = (
    (rf"(\d+)\s*steps?{_FROM}", _every(EverySteps)),
    (rf"(\d+)\s*optimizer[ _]steps?{_FROM}", _every(EveryOptimizerSteps)),
    (rf"(\d+)\s*epochs?{_FROM}", _every(EveryEpochs)),
    (r"([\d.e+-]+)\s*(?:s|sec|seconds?)", lambda s: EverySeconds(float(s))),
    (r"([\d.e+-]+)\s*(?:min|minutes?)", lambda s: EverySeconds(float(s) * 60)),
    (r"([\d.e+-]+)\s*(?:h|hours?)", lambda s: EverySeconds(float(s) * 3600)),
    (r"at steps?\s+(\d+(?:\s*,\s*\d+)*)", lambda text: AtSteps(map(int, text.split(",")))),
    (r"(first)", lambda _: First()),
    (r"(last)", lambda _: Last()),
)
_ANY_PART = rf"\s*(?:{'|'.join(pattern for pattern, _ in _PATTERNS)})\s*"
_EXAMPLES = (
    "'100 steps', '100 steps from 0', '50 optimizer steps', '1 epoch', '30 s', '10 min', '2 h', "
    "'at steps 10, 20', 'first' or 'last', several joined by '|'"
)
_JSON_SCHEMA = {
    "type": "string",
    "pattern": rf"^{_ANY_PART}(?:\|{_ANY_PART})*$",  # JSON Schema can't ignore the case
    "examples": ["100 steps | 1 epoch", "50 optimizer steps", "10 min", "at steps 10, 20", "last"],
    "patternErrorMessage": f"write {_EXAMPLES}",  # shown by editors
}


def _parse_part(part: str, text: str) -> Trigger:
    for pattern, make in _PATTERNS:
        found = re.fullmatch(pattern, part, re.IGNORECASE)
        if found:
            try:
                return make(*found.groups())
            except TriggerError as error:
                raise TriggerError(f"{part!r}: {error}") from None
            except ValueError:  # not a number, such as 1.2.3
                break
    raise TriggerError(
        f"can't read {part!r:.80}"
        + (f" in {text!r:.80}" if part != text else "")
        + f" as a trigger; write {_EXAMPLES}"
    )


TriggerField: TypeAlias = Annotated[
    Trigger | str, BeforeValidator(as_trigger), WithJsonSchema(_JSON_SCHEMA)
]
"""Annotation of a config field that holds a trigger; accepts a trigger or its text."""

# Former names, which existing hooks import.
Schedule = Trigger
ScheduleField = TriggerField
