"""A schedule that follows from the time."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from robo_orchard_lab.pipeline.agreement import Agreement
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


class _AgreedClock:
    """Whether the time is up on the first rank's clock, known to all ranks."""

    _late = 0.01  # the share of the period by which it may be late, which bounds the exchanges

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._progress: TrainerProgress | None = None  # of the run that the clock was started in
        self._begun_at = 0.0
        self._agreement = Agreement("first")

    def due(self, args: PipelineHookArgs) -> bool:
        if args.exception is not None:
            return False  # the other ranks may never come here, to answer
        progress = args.run.progress
        if progress is not self._progress:
            self._progress = progress
            self._agreement = Agreement("first")
            self._begun_at = time.monotonic()
        accelerator, step = args.run.accelerator, progress.steps_done
        if accelerator is None or accelerator.num_processes == 1:
            due = self._left_s() <= 0
        elif not self._agreement.is_due(step):
            return False
        else:
            left_s = self._left_s()
            due = left_s <= self._late * self._period_s
            wait_s = (self._period_s if due else left_s) / 2
            due = bool(self._agreement.reach(step, due, accelerator, wait_s))
        if due:
            self._begun_at = time.monotonic()
        return due

    def _left_s(self) -> float:
        return self._period_s - (time.monotonic() - self._begun_at)
