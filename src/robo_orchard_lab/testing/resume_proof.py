"""The proof that a run which is stopped and resumed is the run that never stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.build_source import describe_function
from robo_orchard_lab.testing.record_differences import (
    ResumeDifference,
    attribute_hints,
    compared_values,
    record_differences,
)
from robo_orchard_lab.testing.recorded_process import (
    RecordedProcess,
    RunOrder,
    run_recorded,
)
from robo_orchard_lab.testing.run_record import RunRecord

logger = logging.getLogger(__name__)

Build: TypeAlias = Callable[[Path, Any], HookBasedTrainer] | str
"""``build(run_folder, resume_from)`` makes a trainer; as a function, ``"module:name"`` or
``"file.py:name"``. It hands ``resume_from`` (None, a path, or "auto") on to the trainer."""

IGNORED = ("metric perf/*",)
"""What may differ by default: what is measured in seconds."""
_TOLD = 8


class StraightRunError(RuntimeError):
    """The run that is not to stop has failed, so that nothing can be compared with it."""


@dataclass(frozen=True, slots=True)
class ResumeProof:
    """What came of :func:`prove_resume`."""

    differences: tuple[ResumeDifference, ...]
    """What is not as in the straight run, in the order of time; each name once."""
    stops: tuple[int, ...]
    """At how many steps done the run was stopped, and gone on with by another process."""
    steps: int
    """How many steps the straight run had."""
    values: int
    """How many values and events were compared."""
    hints: tuple[str, ...] = ()
    """Attributes of hooks that a process began with other values of; often what was not saved."""
    failure: str = field(default="", repr=False)
    """The end of what a resumed process printed before it failed; empty where none did."""

    @property
    def passed(self) -> bool:
        """Whether there is no difference."""
        return not self.differences

    def check(self) -> None:
        """Raise ``AssertionError``, with all of this as its message, if there is a difference."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        stops = ", ".join(map(str, self.stops))
        if self.passed:
            return (
                f"resumed exactly: {self.steps} steps, stopped at {stops}; "
                f"{self.values} values and events are those of the straight run"
            )
        first, *others = self.differences
        lines = [
            f"a run that was stopped at {stops} and resumed is not the run that never stopped",
            f"first difference: {first}",
            f"    straight: {first.straight}",
            f"    resumed:  {first.resumed}",
            f"    (in the process that began with {first.began_at} steps done)",
        ]
        if others:
            told = [*map(str, others[:_TOLD])]
            rest = len(others) - len(told)
            lines.append("then: " + "; ".join(told) + (f"; and {rest} more" if rest else ""))
        if self.hints:
            lines.append("hooks' attributes that were not what they are in the straight run:")
            lines += [f"    {hint}" for hint in self.hints[:_TOLD]]
        if self.failure:
            lines += ["the process printed:", *(f"    {x}" for x in self.failure.splitlines())]
        return "\n".join(lines)


def prove_resume(
    build: Build,
    steps: int | None,
    stops: Iterable[int],
    *,
    folder: str | os.PathLike[str] | None = None,
    files: Sequence[str] = (),
    ignore: Iterable[str] = IGNORED,
    timeout_s: float = 600.0,
) -> ResumeProof:
    """Run a training straight through, and with stops in processes of their own, and compare them.

    >>> proof = prove_resume("robo_orchard_lab.testing.example_training:build", 4, [3])
    >>> print(proof)  # doctest: +ELLIPSIS
    resumed exactly: 4 steps, stopped at 3; ... values and events are those of the straight run
    >>> proof.check()

    At each stop, a hook asks the trainer to stop; it returns, is saved, and its process ends. A
    fresh process makes the trainer anew, with ``resume_from``, and goes on. Compared, step by step,
    are the samples and the contents of each batch, the order of all channels, the loss, and ahead
    of each step and at the end the weights, the open gradients, the optimizer's state by the names
    of parameters, the schedule, the random states of torch, NumPy and Python, the state of every
    hook, and what was published and not logged yet. All of it bit for bit. What a hook keeps and
    does not save shows in what it does.

    Both runs begin with the same seeds of torch, NumPy and Python; a process that resumes begins
    with others, which ``resume_from`` has to make good.

    Every step waits for the device and looks at all weights, so take a run of few steps. It runs
    in one process at a time, on the devices that ``build`` chooses.

    Args:
        build: ``build(run_folder, resume_from)`` makes the trainer, with a fresh model, data and
            hooks; defined at the top of a module or script, since other processes import it. A
            ``functools.partial`` with plain arguments is one, too.
        steps: after how many steps the run is over; None for where the trainer ends by itself.
        stops: after how many steps to stop, in any order. At ``steps``, or after the end of the
            run, going on has nothing left to do.
        folder: where the runs write, which then is kept; must not exist or be empty. By default a
            temporary one.
        files: names of files in the run folder that must be equal, byte for byte, at the end.
        ignore: patterns of the names of what may differ, as they are in a difference.
        timeout_s: how long each process may take, in seconds.

    Raises:
        StraightRunError: the straight run fails or takes too long; with the end of its output.
        TypeError: other processes can't find ``build``.
        ValueError: no stop, or one that is not within the run.
        FileExistsError: there is something in ``folder``.
    """
    source = describe_function(build)
    at = sorted(set(stops))
    if not at or at[0] < 1 or (steps is not None and at[-1] > steps):
        raise ValueError(
            f"stops must be from 1 to {steps or 'the end of the run'}, at least one; got {at}"
        )
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as chosen:
        runs = _Runs(source, Path(chosen).resolve(), steps, timeout_s)
        runs.begin()
        straight = runs.straight()
        processes = runs.with_stops(at)
        differences = [*_differences(straight, processes, tuple(ignore))]
        if not processes[-1].exit_code:
            differences += runs.file_differences(files, straight.last)
    parts = [process.record for process in processes if process.record is not None]
    return ResumeProof(
        tuple(differences),
        tuple(at),
        straight.last,
        compared_values(straight),
        tuple(attribute_hints(straight, parts)) if differences else (),
        processes[-1].output if processes[-1].exit_code else "",
    )


@dataclass(frozen=True, slots=True)
class _Runs:
    """The processes of a proof, and the files that they write."""

    build: dict[str, Any]
    root: Path
    steps: int | None
    timeout_s: float

    def begin(self) -> None:
        if self.root.exists() and any(self.root.iterdir()):
            raise FileExistsError(f"{self.root} is not empty; name a folder that is, or a new one")
        for folder in ("straight", "resumed", "records"):
            (self.root / folder).mkdir(parents=True)

    def straight(self) -> RunRecord:
        """The run in one process."""
        process = self._run("straight", "straight", stop_after=self.steps)
        if process.exit_code or process.record is None:
            raise StraightRunError(
                f"the straight run {_ending(process)}; it printed:\n{process.output}"
            )
        return process.record

    def with_stops(self, stops: Sequence[int]) -> list[RecordedProcess]:
        """The run in several processes, up to the first that fails."""
        processes: list[RecordedProcess] = []
        checkpoint: str | None = None
        for number, stop in enumerate([*stops, self.steps]):
            save_to = str(self.root / "checkpoints" / f"stop-{number}")
            processes.append(
                self._run(
                    f"resumed-{number}",
                    "resumed",
                    resume_from=checkpoint,
                    stop_after=stop,
                    seed=number,
                    save_to=save_to if number < len(stops) else None,
                )
            )
            if processes[-1].exit_code:
                break
            checkpoint = save_to
        return processes

    def _run(self, name: str, run_folder: str, **order: Any) -> RecordedProcess:
        folder, record = self.root / run_folder, self.root / "records" / f"{name}.jsonl"
        process = run_recorded(
            RunOrder(self.build, str(folder), str(record), timeout_s=self.timeout_s, **order),
            kind=run_folder,
        )
        logger.info("%s: %s, in %.1f s", name, _ending(process), process.seconds)
        return process

    def file_differences(self, names: Iterable[str], step: int) -> Iterator[ResumeDifference]:
        """Files of the two run folders that are not equal."""
        for name in names:
            expected, found = (
                (self.root / run / name).read_bytes().splitlines(keepends=True)
                if (self.root / run / name).is_file()
                else None
                for run in ("straight", "resumed")
            )
            if expected is None or found is None:
                if expected is not found:
                    texts = ["no such file" if x is None else "a file" for x in (expected, found)]
                    yield ResumeDifference(step, f"file {name}", texts[0], texts[1], 0)
                continue
            for number, (one, other) in enumerate(zip_longest(expected, found), start=1):
                if one != other:
                    texts = [f"line {number} is {line!r:.160}" for line in (one, other)]
                    yield ResumeDifference(step, f"file {name}", texts[0], texts[1], 0)
                    break


def _differences(
    straight: RunRecord, processes: Sequence[RecordedProcess], ignore: Sequence[str]
) -> Iterator[ResumeDifference]:
    parts = [process.record for process in processes if process.record is not None]
    last = processes[-1]
    if not last.exit_code:
        yield from record_differences(straight, parts, ignore)
        return
    failed_in = parts[-1].last if parts else 0
    began_at = parts[-1].start if last.record is not None else failed_in
    for difference in record_differences(straight, parts, ignore):
        if difference.step < failed_in:
            yield difference
    yield ResumeDifference(failed_in, "the process", "goes on", _ending(last), began_at)


def _ending(process: RecordedProcess) -> str:
    """How a process ended, for people."""
    if process.record is None:
        done = "ended before there was a trainer"
    else:
        done = f"began with {process.record.start} steps done and ended at {process.record.last}"
    return f"{done}, with exit code {process.exit_code}" if process.exit_code else done
