"""When a run has made no progress for too long, and what its threads did then."""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.progress import TrainerProgress

# --- signs of life ---------------------------------------------------------------------------
# That work goes on where no step is counted.


_signs = 0


def record_heartbeat() -> None:
    """Tell that some of a longer work is done, such as a batch of an evaluation, or a file."""
    global _signs
    _signs += 1  # a sign that two threads give at once may count once, which is as good


def signs_until_now() -> int:
    """How many there were; it means something only beside another count."""
    return _signs


STACKS_FOLDER = "stalled"


class StallClock:
    """Measures for how long a run has made no progress.

    Steps and updates are progress, so are batches of evaluations, and files of checkpoints that
    are written or read. What the clock counts is looks that have found none, a time apart, so that
    a process that is suspended and goes on has not stalled.

    Args:
        timeout_s: without progress for so long, the run has stalled, in seconds, > 0.
        progress: the counters of the run.
        folder: where stacks are written; None for the standard error output.
        rank: of this process.

    Raises:
        PipelineConfigError: ``timeout_s`` is no such number.
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
        """Begin to count from here."""
        self._seen, self._waited_s = self._counts(), 0.0

    def look(self, after_s: float) -> bool:
        """Look once more, so many seconds after the last time: whether the run has stalled."""
        counts = self._counts()
        if counts != self._seen:
            self._seen, self._waited_s = counts, 0.0
        else:
            self._waited_s += after_s
        return self._waited_s >= self.timeout_s

    def reason(self) -> str:
        """That the run has stalled, for people."""
        where = "on the standard error output" if self._folder is None else f"in {self._folder}"
        return (
            f"no progress for {self.timeout_s:g} s at {self._progress}; the stacks of all "
            f"threads are {where}"
        )

    def write_stacks(self) -> None:
        """Write what every thread of this process is at. A file that can't be written is stderr."""
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
        return (progress.steps_done, progress.optimizer_step_id, signs_until_now())
