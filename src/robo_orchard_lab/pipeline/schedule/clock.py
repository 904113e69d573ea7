"""A schedule that follows from the time."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast

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

_MANY_STEPS = 1 << 31


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
