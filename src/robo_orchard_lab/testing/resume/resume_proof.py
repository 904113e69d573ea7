"""The proof that a run which is stopped and resumed is the run that never stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.resume.proof_runs import ProofRuns
from robo_orchard_lab.testing.resume.record_differences import ResumeDifference, compared_values
from robo_orchard_lab.testing.resume.recorded_process import describe_function

Build: TypeAlias = Callable[[Path, Any], HookBasedTrainer] | str
"""``build(run_folder, resume_from)`` makes a trainer; as a function, ``"module:name"`` or
``"file.py:name"``. It hands ``resume_from`` (None, a path, or "auto") on to the trainer."""

IGNORED = ("metric perf/*",)
"""What may differ by default: what is measured in seconds."""
_TOLD = 8


@dataclass(frozen=True, slots=True)
class ResumeProof:
    """What came of :func:`prove_resume`."""

    differences: tuple[ResumeDifference, ...]
    """What is not as in the straight run, in the order of time; each name once."""
    stops: tuple[int, ...]
    """At how many steps done the run was stopped, and gone on with by other processes."""
    steps: int
    """How many steps the straight run had."""
    values: int
    """How many values and events were compared."""
    kills: int | None = None
    """How many starts were killed; None where they were stopped."""
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
        ended = f"stopped at {', '.join(map(str, self.stops))}"
        if self.kills is not None:
            ended = f"killed {self.kills} times"
        if self.passed:
            return (
                f"resumed exactly: {self.steps} steps, {ended}; "
                f"{self.values} values and events are those of the straight run"
            )
        first, *others = self.differences
        lines = [
            f"a run that was {ended} and resumed is not the run that never stopped",
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
    kill: bool = False,
    folder: str | os.PathLike[str] | None = None,
    files: Sequence[str] = (),
    ignore: Iterable[str] = IGNORED,
    timeout_s: float = 600.0,
    processes: int = 1,
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

    With ``kill``, nothing is asked: the process is killed (SIGKILL) at a random instant of the step
    that ends there, or of the commit point after it, and the next one begins with
    ``resume_from="auto"``. The run has to save, by a ``SaveCheckpoint``, and best every step. It is
    a difference, too, where a process begins ahead of a checkpoint that ``run_state.json`` told of.

    Both runs begin with the same seeds of torch, NumPy and Python; a process that resumes begins
    with others, which ``resume_from`` has to make good (but not after a kill, which may come ahead
    of the first save).

    With several ``processes``, each start is a job of so many ranks, as torchrun would start them;
    what is compared is that of each rank. To kill, one is killed, and the others soon after it.

    Every step waits for the device and looks at all weights, so take a run of few steps. It runs
    on the devices that ``build`` chooses.

    Args:
        build: ``build(run_folder, resume_from)`` makes the trainer, with a fresh model, data and
            hooks; defined at the top of a module or script, since other processes import it. A
            ``functools.partial`` with plain arguments is one, too.
        steps: after how many steps the run is over; None for where the trainer ends by itself.
        stops: after how many steps to stop, in any order. At ``steps``, or after the end of the
            run, going on has nothing left to do. To kill, a number may be there several times.
        kill: kill processes instead of stopping them.
        folder: where the runs write, which then is kept; must not exist or be empty. By default a
            temporary one.
        files: names of files in the run folder that must be equal, byte for byte, at the end.
        ignore: patterns of the names of what may differ, as they are in a difference.
        timeout_s: how long each process may take, in seconds.
        processes: how many ranks the run has.

    Raises:
        StraightRunError: the straight run fails or takes too long; with the end of its output.
        TypeError: other processes can't find ``build``.
        ValueError: no stop, or one that is not within the run; no process.
        FileExistsError: there is something in ``folder``.
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
        runs.begin()
        straight = runs.straight(saves=kill)
        runs.resumed(at, kill=kill)
        differences = [*runs.differences(tuple(ignore), files)]
        return ResumeProof(
            tuple(differences),
            tuple(at),
            straight[0].last,
            sum(map(compared_values, straight)),
            kills=runs.kills if kill else None,
            hints=tuple(runs.hints()) if differences else (),
            failure=runs.failure,
        )
