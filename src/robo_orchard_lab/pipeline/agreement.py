"""What one rank finds out by itself, known to all ranks at the same step."""

from __future__ import annotations

import time
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed

from robo_orchard_lab.pipeline.host_group import host_group

Whose: TypeAlias = Literal["first", "any"]

_MANY_STEPS = 1 << 31
_SHARE = 0.01  # of the time, at most, that goes into exchanges
_LONGEST_WAIT_S = 5.0


class Agreement:
    """A number that ranks agree on now and then: a clock's answer, a signal that came.

    Only at some steps, known to all ranks alike, is it exchanged; each exchange also settles when
    the next one is due. Where nobody says in what time that is, exchanges take up a hundredth of
    the time, and are at most some five seconds apart; with steps that are slow beside an exchange,
    each step has one. They go through memory of the host, so that the device is not waited for.

    Args:
        whose: the number of the first rank, or the highest of ``any`` rank.
    """

    def __init__(self, whose: Whose) -> None:
        self._whose = whose
        self._due_at_step = 0
        self._last_step = 0
        self._last_at: float | None = None
        self._costs_s: list[float] = []  # of the last exchanges, without the first, which connects

    def is_due(self, step: int) -> bool:
        """Whether the ranks exchange with this step; the same on all of them."""
        return step >= self._due_at_step

    def reach(self, step: int, found: int, accelerator: Any, wait_s: float | None = None) -> int:
        """What the ranks agree on. All of them have to call it, with the same step: a collective.

        Args:
            step: how many steps are done.
            found: what this rank has found.
            accelerator: the processes that take part.
            wait_s: in what time to ask again, at the pace of the steps since the last exchange;
                the first rank's, or the shortest of ``any`` rank.
        """
        began_at = time.monotonic()
        if wait_s is None:
            wait_s = self._affordable_wait_s()
        wait_steps = int(min(max(1.0, wait_s * self._steps_per_s(step, began_at)), _MANY_STEPS))
        rows = _exchange([found, wait_steps], accelerator)
        if self._last_at is not None:
            self._costs_s = [*self._costs_s[-4:], time.monotonic() - began_at]
        self._last_step, self._last_at = step, began_at
        if self._whose == "any":
            found, wait_steps = max(row[0] for row in rows), min(row[1] for row in rows)
        else:
            found, wait_steps = rows[0]
        self._due_at_step = step + wait_steps
        return found

    def _affordable_wait_s(self) -> float:
        # The mean of the last ones, since one rank may have waited for another in one of them.
        mean_s = sum(self._costs_s) / max(1, len(self._costs_s))
        return min(mean_s / _SHARE, _LONGEST_WAIT_S)

    def _steps_per_s(self, step: int, now: float) -> float:
        taken_s = 0.0 if self._last_at is None else now - self._last_at
        return (step - self._last_step) / taken_s if taken_s > 0 else 0.0


def _exchange(numbers: list[int], accelerator: Any) -> list[list[int]]:
    """The numbers of each rank."""
    own = torch.tensor(numbers)
    rows = torch.empty(accelerator.num_processes, len(own), dtype=own.dtype)
    torch.distributed.all_gather(list(rows.unbind()), own, group=host_group())  # a collective
    return [[int(number) for number in row] for row in rows.tolist()]
