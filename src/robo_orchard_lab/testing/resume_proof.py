"""Proof of the exact resume of a stopped or killed run.

`prove_resume` runs a training twice, both times in worker processes: uninterrupted, and with stops
or kills. `ProofRuns` starts the workers (see `resume_worker`); the records that the workers write
(see `run_record`) are then compared.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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
    """Result of :func:`prove_resume`."""

    differences: tuple[ResumeDifference, ...]
    """Differences from the uninterrupted run in order of time; each name once."""
    stops: tuple[int, ...]
    """Numbers of completed steps at which the run was stopped."""
    steps: int
    """Number of steps of the uninterrupted run."""
    values: int
    """Number of compared values and events."""
    kills: int | None = None
    """Number of starts that were killed; None if processes were stopped."""
    hints: tuple[str, ...] = ()
    """Hook attributes that differed when a process started; often the state that was not saved."""
    failure: str = field(default="", repr=False)
    """Last output of a resumed process that failed; empty if none failed."""

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
            listed = [*map(str, others[:_MAX_LISTED])]
            rest = len(others) - len(listed)
            lines.append("then: " + "; ".join(listed) + (f"; and {rest} more" if rest else ""))
        if self.hints:
            lines.append("hook attributes that differ from the uninterrupted run:")
            lines += [f"    {hint}" for hint in self.hints[:_MAX_LISTED]]
        if self.failure:
            lines += ["the process printed:", *(f"    {x}" for x in self.failure.splitlines())]
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
        runs = ProofRuns(source, Path(chosen).resolve(), steps, timeout_s, processes)
        runs.create_folders()
        straight = runs.run_straight(requires_saves=kill)
        runs.run_with_kills(at) if kill else runs.run_with_stops(at)
        differences = [*runs.differences(tuple(ignore), files)]
        return ResumeProof(
            tuple(differences),
            tuple(at),
            straight[0].last,
            sum(map(compared_values, straight)),
            kills=runs.kills if kill else None,
            hints=tuple(runs.hints()) if differences else (),
            failure=_output(runs.failed()),
        )


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
        world_size: int = 1,
    ) -> None:
        self._build = build
        self._root = root
        self._steps = steps
        self._timeout_s = timeout_s
        self._world_size = world_size
        self._straight = [RunRecord(start=0)] * world_size
        self._starts: list[list[RecordedProcess]] = []
        """All ranks of each start of the resumed run, in order of time."""
        self._lost: list[ResumeDifference] = []

    def create_folders(self) -> None:
        """Create the folders of both runs and their records.

        Raises:
            FileExistsError: the root is not empty.
        """
        root = self._root
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(f"{root} is not empty; name an empty or a new folder")
        for folder in ("straight", "resumed", "records"):
            (root / folder).mkdir(parents=True)

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
            raise StraightRunError(
                f"the uninterrupted run {_ending(failed[0])}; it printed:\n{_output(failed)}"
            )
        self._straight = records
        return records

    def run_with_stops(self, stops: Sequence[int]) -> None:
        """Stop, save and resume the run at each stop, until a start fails."""
        checkpoint: str | None = None
        for number, stop in enumerate([*stops, self._steps]):
            save_to = str(self._root / "checkpoints" / f"stop-{number}")
            start = self._run(
                f"resumed-{number}",
                "resumed",
                resume_from=checkpoint,
                stop_after=stop,
                seed=number,
                save_to=save_to if number < len(stops) else None,
            )
            self._check_resumed(start[0].record)
            self._starts.append(start)
            if any(process.exit_code for process in start):
                break
            checkpoint = save_to

    def _check_resumed(self, record: RunRecord | None) -> None:
        """Report a process that started from the beginning: its steps are equal, but repeated."""
        before = self._parts(0)
        if record is None or not before or record.start == before[-1].last:
            return
        self._lost.append(
            ResumeDifference(
                min(record.start, before[-1].last),  # before every difference that follows
                "resume_from",
                f"the previous process saved a run with {before[-1].last} steps done",
                f"it started with {record.start} steps done; does build pass its resume_from to "
                "the trainer?",
                record.start,
            )
        )

    def run_with_kills(self, steps: Sequence[int]) -> None:
        """Kill the run in each of the steps; resume from the newest checkpoint."""
        straight = self._straight[0]
        step_s = straight.duration_s / max(straight.last, 1)
        acknowledged = 0
        for number, step in enumerate([*steps, None]):
            name = f"resumed-{number}"
            records = [self._record(name, rank) for rank in range(self._world_size)]
            should_kill = None if step is None else RandomKill(records, step, step_s)
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
            acknowledged = self._acknowledged_step()

    def _acknowledged_step(self) -> int:
        """Return the step of the newest checkpoint in ``run_state.json``."""
        try:
            saved = read_run_state(self._root / "resumed").checkpoint
        except FileNotFoundError:  # killed early, or a trainer without a run folder
            return 0
        return 0 if saved is None else saved.step

    @property
    def kills(self) -> int:
        """Number of killed starts."""
        return sum(any(p.exit_code == -signal.SIGKILL for p in start) for start in self._starts)

    def failed(self) -> list[RecordedProcess]:
        """Return the failed processes of the last start."""
        return [process for process in self._starts[-1] if process.exit_code]

    def differences(
        self, ignore: Sequence[str], files: Iterable[str]
    ) -> Iterator[ResumeDifference]:
        """Yield all differences from the uninterrupted run in order of time."""
        found = [*self._lost]
        for rank, straight in enumerate(self._straight):
            found += [
                replace(difference, name=f"{self._rank_prefix(rank)}{difference.name}")
                for difference in record_differences(straight, self._parts(rank), ignore)
            ]
        found.sort(key=lambda difference: difference.step)
        failed = self.failed()
        if not failed:
            yield from found
            yield from self.file_differences(files)
            return
        parts = self._parts(0)
        failed_at = parts[-1].last if parts else 0
        began_at = parts[-1].start if failed[0].record is not None else failed_at
        yield from (difference for difference in found if difference.step < failed_at)
        yield ResumeDifference(failed_at, "the process", "continues", _ending(failed[0]), began_at)

    def hints(self) -> list[str]:
        """Describe hook attributes with different values at the start of a process."""
        return [
            f"{self._rank_prefix(rank)}{hint}"
            for rank, straight in enumerate(self._straight)
            for hint in attribute_hints(straight, self._parts(rank))
        ]

    def _rank_prefix(self, rank: int) -> str:
        return "" if self._world_size == 1 else f"rank {rank}: "

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

    def file_differences(self, names: Iterable[str]) -> Iterator[ResumeDifference]:
        """Yield the first difference of each file between both run folders."""
        for name in names:
            expected, found = (
                _lines(self._root / run_folder / name) for run_folder in ("straight", "resumed")
            )
            for number, pair in enumerate(zip_longest(expected, found), start=1):
                if pair[0] != pair[1]:
                    texts = [f"line {number} {text}" for text in _excerpts(*pair)]
                    last = self._straight[0].last
                    yield ResumeDifference(last, f"file {name}", texts[0], texts[1], 0)
                    break


def _ending(process: RecordedProcess) -> str:
    """Describe how a process ended."""
    if process.record is None:
        text = "ended before there was a trainer"
    else:
        text = f"started with {process.record.start} steps done and ended at {process.record.last}"
    return f"{text}, with exit code {process.exit_code}" if process.exit_code else text


def _output(processes: Sequence[RecordedProcess]) -> str:
    return "\n".join(process.output for process in processes)


def _lines(path: Path) -> list[bytes | None]:
    """Return the lines of a file; ``[None]`` for a missing file."""
    return [*path.read_bytes().splitlines(keepends=True)] if path.is_file() else [None]


def _excerpts(line: bytes | None, other: bytes | None) -> Iterator[str]:
    """Yield an excerpt of each line around the first difference."""
    pairs = enumerate(zip_longest(line or b"", other or b""))
    start = max(0, next((at for at, (a, b) in pairs if a != b), 0) - 30)
    for text in (line, other):
        yield "is missing" if text is None else f"has at {start}: {text[start : start + 80]!r}"
