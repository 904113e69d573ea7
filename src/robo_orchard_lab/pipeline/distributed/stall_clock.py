"""Stall detection: heartbeats of long work, and a clock that measures time without progress."""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.progress import TrainerProgress

_heartbeats = 0


def record_heartbeat() -> None:
    """Record progress of long work, such as a batch of an evaluation or a written file."""
    global _heartbeats
    _heartbeats += 1  # two threads at once may count as one, which is harmless


STACKS_FOLDER = "stalled"


class StallClock:
    """Clock of the time that a run makes no progress.

    Steps, optimizer steps, batches of evaluations, and files of checkpoints are progress. The clock
    counts checks without progress, so a suspended process has not stalled when it continues. Stacks
    are written to the run folder ``folder``, else to standard error.

    Raises:
        PipelineConfigError: ``timeout_s`` is not a number > 0.
    """

    def __init__(
        self,
        timeout_s: float,
        progress: TrainerProgress,
        folder: str | os.PathLike[str] | None = None,
        rank: int = 0,
    ) -> None:
        if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
            raise PipelineConfigError(
                f"stall_timeout_s must be > 0 seconds, or None, got {timeout_s!r}"
            )
        self.timeout_s = timeout_s
        self._progress = progress
        self._folder = None if folder is None else Path(folder) / STACKS_FOLDER
        self._rank = rank
        self._seen = self._counts()
        self._waited_s = 0.0

    def start(self) -> None:
        """Restart the measurement."""
        self._seen, self._waited_s = self._counts(), 0.0

    def look(self, after_s: float) -> bool:
        """Return True if the run has stalled; ``after_s`` is the time since the last check."""
        counts = self._counts()
        if counts != self._seen:
            self._seen, self._waited_s = counts, 0.0
        else:
            self._waited_s += after_s
        return self._waited_s >= self.timeout_s

    def reason(self) -> str:
        """Describe the stall."""
        where = "on standard error" if self._folder is None else f"in {self._folder}"
        return (
            f"no progress for {self.timeout_s:g} s at {self._progress}; the stacks of all "
            f"threads are {where}"
        )

    def write_stacks(self) -> None:
        """Write the stacks of all threads to a file, or to standard error."""
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / f"rank{self._rank:05}.txt").open("w") as file:
                    self._write(file)
                return
        self._write(sys.__stderr__ or sys.stderr)

    def _write(self, file: object) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = f"rank {self._rank}, process {os.getpid()}, {now}, at {self._progress}\n\n"
        print(text, file=file, end="", flush=True)  # type: ignore[call-overload]
        faulthandler.dump_traceback(file, all_threads=True)  # type: ignore[arg-type]

    def _counts(self) -> tuple[int, ...]:
        progress = self._progress
        return (progress.steps_done, progress.optimizer_step_id, _heartbeats)
