"""The two runs that a proof compares, each in processes of its own."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing.resume.record_differences import (
    ResumeDifference,
    attribute_hints,
    record_differences,
)
from robo_orchard_lab.testing.resume.recorded_process import RecordedProcess, RunOrder, run_ranks
from robo_orchard_lab.testing.resume.run_record import RunRecord

# --- killing ---------------------------------------------------------------------------------
# When processes of a run are killed.


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


logger = logging.getLogger(__name__)


class StraightRunError(RuntimeError):
    """The run that is not to stop has failed, so that nothing can be compared with it."""


class ProofRuns:
    """A run that never stops, and one that is stopped or killed, with the files that they write.

    Args:
        build: what makes the trainer, as :func:`describe_function` gives it.
        root: the folder for both.
        steps: after how many steps they are over; None for their own end.
        timeout_s: for each process.
        ranks: how many processes take part in each.
    """

    def __init__(
        self,
        build: dict[str, Any],
        root: Path,
        steps: int | None,
        timeout_s: float,
        ranks: int = 1,
    ) -> None:
        self._build = build
        self._root = root
        self._steps = steps
        self._timeout_s = timeout_s
        self._ranks = ranks
        self._straight = [RunRecord(start=0)] * ranks
        self._starts: list[list[RecordedProcess]] = []
        """Of the run that is stopped or killed, in the order of time, each of all ranks."""
        self._lost: list[ResumeDifference] = []

    def begin(self) -> None:
        """Make the folders.

        Raises:
            FileExistsError: there is something in them.
        """
        root = self._root
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(f"{root} is not empty; name a folder that is, or a new one")
        for folder in ("straight", "resumed", "records"):
            (root / folder).mkdir(parents=True)

    def straight(self, *, saves: bool) -> list[RunRecord]:
        """What each rank does that never stops; it has to have a hook that saves if it ``saves``.

        Raises:
            StraightRunError: it fails.
        """
        found = self._run("straight", "straight", stop_after=self._steps, saves=saves)
        records = [process.record for process in found if process.record is not None]
        failed = [process for process in found if process.exit_code or process.record is None]
        if failed:
            raise StraightRunError(
                f"the straight run {ending(failed[0])}; it printed:\n{printed(failed)}"
            )
        self._straight = records
        return records

    def resumed(self, stops: Sequence[int], *, kill: bool) -> None:
        """The run in several starts, up to the first that fails."""
        if kill:
            self._with_kills(stops)
        else:
            self._with_stops(stops)

    def _with_stops(self, stops: Sequence[int]) -> None:
        checkpoint: str | None = None
        for number, stop in enumerate([*stops, self._steps]):
            save_to = str(self._root / "checkpoints" / f"stop-{number}")
            started = self._run(
                f"resumed-{number}",
                "resumed",
                resume_from=checkpoint,
                stop_after=stop,
                seed=number,
                save_to=save_to if number < len(stops) else None,
            )
            self._check_start(started[0].record)
            self._starts.append(started)
            if any(process.exit_code for process in started):
                break
            checkpoint = save_to

    def _check_start(self, begun: RunRecord | None) -> None:
        """Whoever does all again from the beginning does the same, too, and has resumed nothing."""
        before = self._parts(0)
        if begun is None or not before or begun.start == before[-1].last:
            return
        self._lost.append(
            ResumeDifference(
                min(begun.start, before[-1].last),  # ahead of all that follows from it
                "resume_from",
                f"the process before it has saved a run with {before[-1].last} steps done",
                f"it began with {begun.start} steps done; does build hand on its resume_from?",
                begun.start,
            )
        )

    def _with_kills(self, stops: Sequence[int]) -> None:
        straight = self._straight[0]
        step_s = straight.took_s / max(straight.last, 1)
        acknowledged = 0
        for number, stop in enumerate([*stops, None]):
            name = f"resumed-{number}"
            records = [self._record(name, rank) for rank in range(self._ranks)]
            kill = None if stop is None else Killing(records, stop, step_s)
            started = self._run(
                name, "resumed", resume_from="auto", stop_after=self._steps, kill_when=kill
            )
            self._starts.append(started)
            for begun in (process.record for process in started):
                if begun is not None and begun.start < acknowledged:
                    self._lost.append(
                        ResumeDifference(
                            acknowledged,
                            "checkpoint",
                            f"run_state.json told of one at step {acknowledged}",
                            f"the next process began with {begun.start} steps done",
                            begun.start,
                        )
                    )
            # Those of a rank that is killed may end by themselves, or be killed as well.
            if all(process.exit_code != -signal.SIGKILL for process in started):
                break
            acknowledged = self._acknowledged()

    def _acknowledged(self) -> int:
        """The step of the last checkpoint that the run itself tells of."""
        try:
            saved = read_run_state(self._root / "resumed").checkpoint
        except FileNotFoundError:  # the trainer has no run folder, or did not get so far
            return 0
        return 0 if saved is None else saved.step

    @property
    def kills(self) -> int:
        """How many starts were killed."""
        return sum(any(p.exit_code == -signal.SIGKILL for p in start) for start in self._starts)

    @property
    def failure(self) -> str:
        """The end of what the last processes printed, of those that have failed."""
        return printed(self._failed())

    def _failed(self) -> list[RecordedProcess]:
        return [process for process in self._starts[-1] if process.exit_code]

    def differences(
        self, ignore: Sequence[str], files: Iterable[str]
    ) -> Iterator[ResumeDifference]:
        """What is not as in the straight run, in the order of time."""
        found = [*self._lost]
        for rank, straight in enumerate(self._straight):
            found += [
                replace(difference, name=f"{self._of_rank(rank)}{difference.name}")
                for difference in record_differences(straight, self._parts(rank), ignore)
            ]
        found.sort(key=lambda difference: difference.step)
        failed = self._failed()
        if not failed:
            yield from found
            yield from self.file_differences(files)
            return
        parts = self._parts(0)
        failed_in = parts[-1].last if parts else 0
        began_at = parts[-1].start if failed[0].record is not None else failed_in
        yield from (difference for difference in found if difference.step < failed_in)
        yield ResumeDifference(failed_in, "the process", "goes on", ending(failed[0]), began_at)

    def hints(self) -> list[str]:
        """What resumed processes began with that may be why."""
        return [
            f"{self._of_rank(rank)}{hint}"
            for rank, straight in enumerate(self._straight)
            for hint in attribute_hints(straight, self._parts(rank))
        ]

    def _of_rank(self, rank: int) -> str:
        return "" if self._ranks == 1 else f"rank {rank}: "

    def _parts(self, rank: int) -> list[RunRecord]:
        found = (start[rank].record for start in self._starts)
        return [record for record in found if record is not None]

    def _record(self, name: str, rank: int) -> Path:
        of_rank = "" if self._ranks == 1 else f"-rank{rank}"
        return self._root / "records" / f"{name}{of_rank}.jsonl"

    def _run(
        self,
        name: str,
        run_folder: str,
        *,
        kill_when: Callable[[int], bool] | None = None,
        seed: int = 0,
        **order: Any,
    ) -> list[RecordedProcess]:
        """All ranks, to their end."""
        orders = [
            RunOrder(
                self._build,
                str(self._root / run_folder),
                str(self._record(name, rank)),
                seed=seed + 1_000_000 * rank,
                rank=rank,
                ranks=self._ranks,
                meeting=str(self._root / "records" / f"{name}.meeting"),
                timeout_s=self._timeout_s,
                **order,
            )
            for rank in range(self._ranks)
        ]
        found = run_ranks(orders, run_folder, kill_when)
        for process in found:
            logger.info("%s: %s, in %.1f s", name, ending(process), process.seconds)
        return found

    def file_differences(self, names: Iterable[str]) -> Iterator[ResumeDifference]:
        """Files of the two run folders that are not equal."""
        for name in names:
            expected, found = (
                _lines(self._root / run_folder / name) for run_folder in ("straight", "resumed")
            )
            for number, (one, other) in enumerate(zip_longest(expected, found), start=1):
                if one != other:
                    told = [f"line {number} {text}" for text in _around_difference(one, other)]
                    last = self._straight[0].last
                    yield ResumeDifference(last, f"file {name}", told[0], told[1], 0)
                    break


def ending(process: RecordedProcess) -> str:
    """How a process ended, for people."""
    if process.record is None:
        done = "ended before there was a trainer"
    else:
        done = f"began with {process.record.start} steps done and ended at {process.record.last}"
    return f"{done}, with exit code {process.exit_code}" if process.exit_code else done


def printed(processes: Sequence[RecordedProcess]) -> str:
    """What processes have printed, the one after the other."""
    return "\n".join(process.output for process in processes)


def _lines(path: Path) -> list[bytes | None]:
    """The lines of a file; as if it were one line, None, where there is no file."""
    return [*path.read_bytes().splitlines(keepends=True)] if path.is_file() else [None]


def _around_difference(one: bytes | None, other: bytes | None) -> Iterator[str]:
    """Two lines, from a little ahead of where they differ."""
    pairs = enumerate(zip_longest(one or b"", other or b""))
    begin = max(0, next((at for at, (a, b) in pairs if a != b), 0) - 30)
    for line in (one, other):
        yield "is missing" if line is None else f"has at {begin}: {line[begin : begin + 80]!r}"
