"""A schedule that follows from the time."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.schedule.base import (
    STEP_CHANNELS,
    Due,
    Role,
    Schedule,
    ScheduleError,
)


@dataclass(frozen=True)
class EverySeconds(Schedule):
    """With the first step that is asked s seconds or more after the last time, or after the start.

    The start is the first time that it is asked, also in a resumed run. The clock is that of the
    first rank. Others learn from it in the run's exchanges (:class:`Agreement`), one of which is
    due after about half of the time that is left. So it takes some ten of them each time, however
    long s is, and may be early by a hundredth of s, and late by a step or two; later, where steps
    begin to take longer, or where exchanges are to be further apart.

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
