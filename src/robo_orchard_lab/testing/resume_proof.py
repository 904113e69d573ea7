"""Proof of the exact resume of a stopped or killed run.

`prove_resume` runs a training twice in worker processes (see `resume_worker`), uninterrupted and
with stops or kills, and compares the records that the workers write (see `run_record`).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.resume_worker import (
    RandomKill,
    RecordedProcess,
    RunOrder,
    describe_function,
    run_ranks,
)
from robo_orchard_lab.testing.run_record import (
    ResumeDifference,
    RunRecord,
    attribute_hints,
    compared_values,
    record_differences,
)

logger = logging.getLogger(__name__)

Build: TypeAlias = Callable[[Path, Any], HookBasedTrainer] | str
"""``build(run_folder, resume_from)``, which returns a trainer; or ``"module:name"`` or
``"file.py:name"`` of such a function. The function passes ``resume_from`` (None, a path, or "auto")
to the trainer."""

IGNORED = ("metric perf/*",)
"""Facts that may differ by default: measured times."""
_MAX_LISTED = 8


class StraightRunError(RuntimeError):
    """Failure of the uninterrupted run; no comparison is possible."""


@dataclass(frozen=True, slots=True)
class ResumeProof:
    """Result of :func:`prove_resume`.

    Attributes:
        differences: Differences from the uninterrupted run in order of time; each name once.
        stops: Numbers of completed steps at which the run was stopped.
        steps: Number of steps of the uninterrupted run.
        values: Number of compared values and events.
        kills: Number of starts that were killed; None if processes were stopped.
        hints: Hook attributes that differed when a process started; often the state that was not
            saved.
        failure: Last output of a resumed process that failed; empty if none failed.
    """

    differences: tuple[ResumeDifference, ...]
    stops: tuple[int, ...]
    steps: int
    values: int
    kills: int | None = None
    hints: tuple[str, ...] = ()
    failure: str = field(default="", repr=False)

    @property
    def passed(self) -> bool:
        """Return True for equal runs."""
        return not self.differences

    def check(self) -> None:
        """Raise ``AssertionError`` with a report of the differences, if any."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        ended = f"stopped at {', '.join(map(str, self.stops))}"
        if self.kills is not None:
            ended = f"killed {self.kills} times"
        if self.passed:
            return (
                f"resumed exactly: {self.steps} steps, {ended}; "
                f"{self.values} values and events equal those of the uninterrupted run"
            )
        first, *others = self.differences
        lines = [
            f"a run that was {ended} and resumed differs from the uninterrupted run",
            f"first difference: {first}",
            f"    uninterrupted: {first.straight}",
            f"    resumed:       {first.resumed}",
            f"    (in the process that started with {first.began_at} steps done)",
        ]
        if others:
            rest = len(others) - _MAX_LISTED
            more = [f"and {rest} more"] if rest > 0 else []
            lines.append("then: " + "; ".join([*map(str, others[:_MAX_LISTED]), *more]))
        if self.hints:
            lines.append("hook attributes that differ from the uninterrupted run:")
            lines += [f"    {hint}" for hint in self.hints[:_MAX_LISTED]]
        if self.failure:
            lines += [
                "the process printed:",
                *(f"    {each}" for each in self.failure.splitlines()),
            ]
        return "\n".join(lines)


def prove_resume(
    build: Build,
    steps: int | None,
    stops: Iterable[int],
    *,
    kill: bool = False,
    folder: str | os.PathLike[str] | None = None,
    files: Sequence[str] = (),
    ignore: Iterable[str] = IGNORED,
    timeout_s: float = 600.0,
    processes: int = 1,
) -> ResumeProof:
    """Run a training uninterrupted and with stops, each in its own processes; compare both runs.

    >>> proof = prove_resume("robo_orchard_lab.testing.fixtures:build_example", 4, [3])
    >>> print(proof)  # doctest: +ELLIPSIS
    resumed exactly: 4 steps, stopped at 3; ... values and events equal those of the uninterr...
    >>> proof.check()

    At each stop, the trainer returns, a checkpoint is saved, and the process ends. A new process
    calls ``build`` with ``resume_from`` and continues. Compared bit for bit, for each step: sample
    indices, batches, events and losses; before each step and at the end: weights, accumulated
    gradients, optimizer, LR scheduler, RNG states, hook states and unlogged metrics.

    With ``kill``, a process is killed (SIGKILL) at a random instant of a step or of its commit
    point, and the next process starts with ``resume_from="auto"``. The run must have a
    ``SaveCheckpoint`` hook, best with ``every="1 step"``. A checkpoint that is listed in
    ``run_state.json`` and not found by the next process is a difference.

    Both runs start with the same seeds. A resumed process starts with other seeds, which
    ``resume_from`` has to override; after a kill, which may precede the first save, with the same.

    With several ``processes``, each start is a job of as many ranks, and each rank is compared. A
    kill hits one rank first and the other ranks shortly after.

    multiprocessing's forkserver starts the processes: call this function in a script under
    ``if __name__ == "__main__":``. All processes share one hash seed, and so the order of sets. Use
    a run of few steps: every step waits for the device and reads all weights.

    Args:
        build: ``build(run_folder, resume_from)`` returns a trainer with a new model, data and
            hooks. A function at the top level of a module or script, a ``functools.partial`` of
            such a function with JSON-serializable arguments, ``"module:name"`` or
            ``"file.py:name"``.
        steps: length of the run in steps; None for the limits of the trainer.
        stops: numbers of completed steps at which to stop, in any order. With ``kill``, a number
            may be repeated.
        kill: kill processes instead of stopping the trainer.
        folder: an empty or new folder for both runs, which is kept; a temporary folder by default.
        files: files in the run folder that must be identical at the end.
        ignore: patterns of names of facts that may differ.
        timeout_s: time limit of each process, in seconds.
        processes: world size of both runs.

    Raises:
        StraightRunError: the uninterrupted run failed or exceeded the time limit.
        TypeError: another process cannot find ``build``.
        ValueError: no stop, a stop outside the run, or no process.
        FileExistsError: ``folder`` is not empty.
    """
    source = describe_function(build)
    at = sorted(stops) if kill else sorted(set(stops))
    if not at or at[0] < 1 or (steps is not None and at[-1] > steps):
        raise ValueError(
            f"stops must be from 1 to {steps or 'the end of the run'}, at least one; got {at}"
        )
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as chosen:
        root = Path(chosen).resolve()
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(f"{root} is not empty; name an empty or a new folder")
        for name in ("straight", "resumed", "records"):
            (root / name).mkdir(parents=True)
        runs = ProofRuns(source, root, steps, timeout_s, processes)
        straight = runs.run_straight(requires_saves=kill)
        kills = runs.run_with_kills(at) if kill else None
        if not kill:
            runs.run_with_stops(at)
        return runs.compared(straight, tuple(at), kills, tuple(ignore), files)


class ProofRuns:
    """The uninterrupted run and the resumed run of a proof, with their files.

    Args:
        build: location of the function that builds the trainer, from `describe_function`.
        root: folder for both runs.
        steps: length of the runs in steps; None for the limits of the trainer.
        timeout_s: time limit of each process, in seconds.
        world_size: number of ranks of both runs.
    """

    def __init__(
        self,
        build: dict[str, Any],
        root: Path,
        steps: int | None,
        timeout_s: float,
        world_size: int,
    ) -> None:
        self._build = build
        self._root = root
        self._steps = steps
        self._timeout_s = timeout_s
        self._world_size = world_size
        self._step_s = 0.0
        self._starts: list[list[RecordedProcess]] = []
        """All ranks of each start of the resumed run, in order of time."""
        self._lost: list[ResumeDifference] = []

    def run_straight(self, *, requires_saves: bool) -> list[RunRecord]:
        """Run all ranks uninterrupted and return their records.

        Raises:
            StraightRunError: a rank failed, or does not save although saves are required.
        """
        found = self._run(
            "straight", "straight", stop_after=self._steps, requires_saves=requires_saves
        )
        records = [process.record for process in found if process.record is not None]
        failed = [process for process in found if process.exit_code or process.record is None]
        if failed:
            output = "\n".join(process.output for process in failed)
            raise StraightRunError(
                f"the uninterrupted run {_ending(failed[0])}; it printed:\n{output}"
            )
        self._step_s = records[0].duration_s / max(records[0].last, 1)
        return records

    def run_with_stops(self, stops: Sequence[int]) -> None:
        """Stop, save and resume the run at each stop, until a start fails."""
        checkpoint: str | None = None
        for number, stop in enumerate([*stops, self._steps]):
            save_to = str(self._root / "checkpoints" / f"stop-{number}")
            before = self._parts(0)
            start = self._run(
                f"resumed-{number}",
                "resumed",
                resume_from=checkpoint,
                stop_after=stop,
                seed=number,
                save_to=save_to if number < len(stops) else None,
            )
            record = start[0].record
            if before and record is not None and record.start != before[-1].last:
                # A process that starts from the beginning repeats equal steps.
                self._lost.append(
                    ResumeDifference(
                        min(record.start, before[-1].last),  # before every difference that follows
                        "resume_from",
                        f"the previous process saved a run with {before[-1].last} steps done",
                        f"it started with {record.start} steps done; does build pass its "
                        "resume_from to the trainer?",
                        record.start,
                    )
                )
            self._starts.append(start)
            if any(process.exit_code for process in start):
                break
            checkpoint = save_to

    def run_with_kills(self, steps: Sequence[int]) -> int:
        """Kill the run in each of the steps; resume from the newest checkpoint; count kills."""
        acknowledged, kills = 0, 0
        for number, step in enumerate([*steps, None]):
            name = f"resumed-{number}"
            records = [self._record(name, rank) for rank in range(self._world_size)]
            should_kill = None if step is None else RandomKill(records, step, self._step_s)
            start = self._run(
                name, "resumed", should_kill, resume_from="auto", stop_after=self._steps
            )
            self._starts.append(start)
            for record in (process.record for process in start):
                if record is not None and record.start < acknowledged:
                    self._lost.append(
                        ResumeDifference(
                            acknowledged,
                            "checkpoint",
                            f"run_state.json lists a checkpoint at step {acknowledged}",
                            f"the next process started with {record.start} steps done",
                            record.start,
                        )
                    )
            # Ranks of a killed rank may also end by themselves.
            if all(process.exit_code != -signal.SIGKILL for process in start):
                break
            kills += 1
            # No file: killed early, or a trainer without a run folder.
            with suppress(FileNotFoundError):
                saved = read_run_state(self._root / "resumed").checkpoint
                acknowledged = 0 if saved is None else saved.step
        return kills

    def compared(
        self,
        straight: Sequence[RunRecord],
        stops: tuple[int, ...],
        kills: int | None,
        ignore: Sequence[str],
        files: Iterable[str],
    ) -> ResumeProof:
        """Compare the resumed run with the records of the uninterrupted run."""
        found, hints = [*self._lost], []
        for rank, record in enumerate(straight):
            prefix = "" if self._world_size == 1 else f"rank {rank}: "
            parts = self._parts(rank)
            found += [
                replace(difference, name=f"{prefix}{difference.name}")
                for difference in record_differences(record, parts, ignore)
            ]
            hints += [f"{prefix}{hint}" for hint in attribute_hints(record, parts)]
        found.sort(key=lambda difference: difference.step)
        failed = [process for process in self._starts[-1] if process.exit_code]
        last, folders = straight[0].last, (self._root / "straight", self._root / "resumed")
        if failed:
            parts = self._parts(0)
            failed_at = parts[-1].last if parts else 0
            began_at = parts[-1].start if failed[0].record is not None else failed_at
            found = [difference for difference in found if difference.step < failed_at]
            ending = _ending(failed[0])
            found.append(ResumeDifference(failed_at, "the process", "continues", ending, began_at))
        else:
            found += file_differences(*folders, files, last)
        return ResumeProof(
            tuple(found),
            stops,
            last,
            sum(map(compared_values, straight)),
            kills=kills,
            hints=tuple(hints) if found else (),
            failure="\n".join(process.output for process in failed),
        )

    def _parts(self, rank: int) -> list[RunRecord]:
        found = (start[rank].record for start in self._starts)
        return [record for record in found if record is not None]

    def _record(self, name: str, rank: int) -> Path:
        suffix = "" if self._world_size == 1 else f"-rank{rank}"
        return self._root / "records" / f"{name}{suffix}.jsonl"

    def _run(
        self,
        name: str,
        run_folder: str,
        should_kill: Callable[[int], bool] | None = None,
        *,
        seed: int = 0,
        **order: Any,
    ) -> list[RecordedProcess]:
        """Run all ranks of one start to their end."""
        orders = [
            RunOrder(
                self._build,
                str(self._root / run_folder),
                str(self._record(name, rank)),
                seed=seed + 1_000_000 * rank,
                rank=rank,
                world_size=self._world_size,
                rendezvous=str(self._root / "records" / f"{name}.rendezvous"),
                timeout_s=self._timeout_s,
                **order,
            )
            for rank in range(self._world_size)
        ]
        found = run_ranks(orders, should_kill)
        for process in found:
            logger.info("%s: %s", name, _ending(process))
        return found


def file_differences(
    straight: Path, resumed: Path, names: Iterable[str], step: int
) -> Iterator[ResumeDifference]:
    """Yield the first difference of each file between both run folders."""
    for name in names:
        pairs = zip_longest(_lines(straight / name), _lines(resumed / name))
        for number, (line, other) in enumerate(pairs, start=1):
            if line != other:
                byte_pairs = enumerate(zip_longest(line or b"", other or b""))
                start = max(0, next((at for at, (a, b) in byte_pairs if a != b), 0) - 30)
                texts = [
                    "is missing"
                    if text is None
                    else f"has at {start}: {text[start : start + 80]!r}"
                    for text in (line, other)
                ]
                texts = [f"line {number} {text}" for text in texts]
                yield ResumeDifference(step, f"file {name}", texts[0], texts[1], 0)
                break


def _lines(path: Path) -> list[bytes | None]:
    """Return the lines of a file; ``[None]`` for a missing file."""
    return [*path.read_bytes().splitlines(keepends=True)] if path.is_file() else [None]


def _ending(process: RecordedProcess) -> str:
    """Describe how a process ended."""
    if process.record is None:
        text = "ended before there was a trainer"
    else:
        text = f"started with {process.record.start} steps done and ended at {process.record.last}"
    return f"{text}, with exit code {process.exit_code}" if process.exit_code else text
