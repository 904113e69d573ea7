"""What a schedule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

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

    >>> from robo_orchard_lab.pipeline import schedule
    >>> text = "100 steps | 1 epoch"
    >>> Schedule.parse(text) == schedule.EverySteps(100) | schedule.EveryEpochs(1)
    True
    >>> print(schedule.EveryOptimizerSteps(50) | schedule.EverySeconds(600))
    50 optimizer steps | 10 min

    Counted is what is done: ``EverySteps(100)`` is due in the step that brings their number to
    100, 200 and so on, in its ``before`` as in its ``after``. A field that is declared as a
    :data:`ScheduleField` takes one or its text, and is text in files.
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
        from robo_orchard_lab.pipeline.schedule.text import parse  # which knows all kinds

        return parse(text)

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


class _AsText:
    """What JSON Schema says of a field."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        from robo_orchard_lab.pipeline.schedule.text import JSON_SCHEMA

        return JSON_SCHEMA.copy()


ScheduleField: TypeAlias = Annotated[Schedule | str, BeforeValidator(as_schedule), _AsText()]
"""How a configuration declares a schedule: it is given as one or as its text, and held as one."""
