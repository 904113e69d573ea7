"""When processes of a run are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

_APART_S = 0.3
"""How long after one rank another is killed, at most."""


class Killing:
    """Says when to kill ranks: one at a random instant of a step and of what comes after it, the
    others within a third of a second, as what has started them would.

    Args:
        records: what the ranks write down.
        step: the one that brings their number to this.
        step_s: how long a step takes, about.
    """

    def __init__(self, records: Sequence[Path], step: int, step_s: float) -> None:
        chance = random.Random()  # leaves Python's generator alone
        self._victim = chance.randrange(len(records))
        self._when = _KillInStep(records[self._victim], step, chance.uniform(0, 2 * step_s))
        self._after_s = [chance.uniform(0, _APART_S) for _ in records]
        self._killed_at: float | None = None

    def __call__(self, rank: int) -> bool:
        if rank == self._victim:
            if self._when():
                self._killed_at = time.monotonic()
                return True
            return False
        killed_at = self._killed_at
        return killed_at is not None and time.monotonic() > killed_at + self._after_s[rank]


class _KillInStep:
    """Says when to kill a process.

    Args:
        record: what the process writes down.
        step: the one that brings their number to this.
        delay_s: how long after the step has begun.
    """

    def __init__(self, record: Path, step: int, delay_s: float) -> None:
        self._record = record
        self._step = step
        self._delay_s = delay_s
        self._read = 0
        self._due_at: float | None = None

    def __call__(self) -> bool:
        step = self._newest_step()
        if self._due_at is None and step >= self._step - 1:
            self._due_at = time.monotonic() + self._delay_s
        # At the latest when it goes on to the step after the next, however long a step takes here.
        return self._due_at is not None and (time.monotonic() >= self._due_at or step > self._step)

    def _newest_step(self) -> int:
        """The step of the last line that was written since this was asked; -1 for none."""
        if not self._record.exists():
            return -1
        with self._record.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        steps = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, steps))
        return int(steps[-1][1:].partition(b",")[0]) if steps else -1
