"""Training that a command has asked for: in its folder, with what is told before and after it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.output import (
    PROGRAM,
    bytes_text,
    count_text,
    note,
    print_json,
    print_table,
    say,
    table_lines,
)

if TYPE_CHECKING:
    from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.dry_run import DryRun
    from robo_orchard_lab.experiment.existing_run import ExistingRun
    from robo_orchard_lab.experiment.parts import ResumeEffect
    from robo_orchard_lab.experiment.resume_diff import Difference


# --- trial -----------------------------------------------------------------------------------
# ``train --dry-run`` and ``train --debug-fast``: what is told of them.


def show_dry_run(experiment: ExperimentConfig, begins: Beginning, *, as_json: bool) -> None:
    """Try an experiment with one batch, and tell what it would be.

    Raises:
        CommandError: it is started as a job of several processes.
    """
    from robo_orchard_lab.experiment.dry_run import dry_run

    _check_alone("--dry-run")
    found = dry_run(experiment)
    if as_json:
        print_json({**_plain(found), "begins_at": begins.step})
        return
    for name, text in _lines(begins, found):
        say(f"{name:<12} {text}")
    if found.hooks:
        say()
        rows = [
            [hook.hook, hook.field, hook.trigger, "?" if hook.times is None else f"{hook.times:,}"]
            for hook in found.hooks
        ]
        print_table(["hook", "field", "trigger", "times"], rows)
    say()
    say("nothing was written")


def show_fast_run(experiment: ExperimentConfig, *, as_json: bool) -> None:
    """Run two steps of everything, and tell what was done.

    Raises:
        CommandError: it is started as a job of several processes.
    """
    from robo_orchard_lab.experiment.dry_run import fast_run

    _check_alone("--debug-fast")
    done = fast_run(experiment)
    if as_json:
        print_json({"done": done})
        return
    for line in done:
        say(line)
    say("nothing of it was kept")


def _check_alone(option: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CommandError(f"{option} is for one process; leave torchrun out")


def _lines(begins: Beginning, found: DryRun) -> Iterator[tuple[str, str]]:
    yield "run folder", str(found.run_folder)
    changes = ", ".join(change.field for change in begins.changes)
    anew = "anew" if begins.step is None else f"at step {begins.step} of the run in there"
    yield "begins", anew + (f", with other {changes}" if changes else "")
    yield "device", found.device
    frozen = found.parameters - found.trained_parameters
    trained = f", {frozen:,} of them frozen" if frozen else ""
    yield "model", count_text(found.parameters, "parameter") + trained
    length = found.length
    if length is None:
        yield "run", "as long as the data is, which has no length"
    else:
        yield "epoch", count_text(length.steps_per_epoch, "step")
        parts = [(length.epochs, "epoch"), (length.steps, "step"), (length.updates, "update")]
        yield "run", ", ".join(count_text(number, thing) for number, thing in parts)
    if found.loss is not None:
        yield "loss", f"{found.loss:.6g} on the first batch"
    for name, loss in found.evaluated.items():
        yield f"  {name}", f"{loss:.6g} on its first batch"
    memory = found.memory
    yield (
        "memory",
        f"parameters {bytes_text(memory.parameters)}, gradients {bytes_text(memory.gradients)}, "
        f"optimizer {bytes_text(memory.optimizer)}; at most {bytes_text(memory.peak)} in use "
        + ("by this process" if memory.peak_on == "process" else f"on {memory.peak_on}"),
    )


def _plain(found: DryRun) -> dict[str, Any]:
    length = found.length
    return {
        **asdict(found),
        "run_folder": str(found.run_folder),
        "evaluated": dict(found.evaluated),
        "length": None
        if length is None
        else {
            "epochs": length.epochs,
            "steps": length.steps,
            "updates": length.updates,
            "steps_per_epoch": length.steps_per_epoch,
        },
    }


_SHORTEST = 60  # of a value in a table, in characters


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run begins."""

    step: int | None = None
    """Of the newest checkpoint, from which it goes on; None where it begins anew."""
    changes: Sequence[Difference] = ()
    """In what it goes on otherwise than before."""


def beginning(
    experiment: ExperimentConfig,
    arguments: ExperimentArguments,
    *,
    allow: str | None,
    repeats: bool = False,
) -> Beginning:
    """Where a run would begin, if it may.

    Args:
        experiment: what is to be trained.
        arguments: what was typed about it.
        allow: the worst change by which a run may go on, if a harmless one is not all.
        repeats: whether it is the file of the run in its folder, so that it would be repeated.

    Raises:
        CommandError: the run in the folder can't go on as this, is completed, or still goes on.
    """
    from robo_orchard_lab.experiment.existing_run import find_existing_run
    from robo_orchard_lab.experiment.run_folder import find_escaping_link

    if (link := find_escaping_link(experiment.folder())) is not None:
        raise CommandError(
            f"the link {link} leads out of the run's folder, and so would what is written there",
            "remove the link, or give this one a folder of its own by --run_folder FOLDER",
        )
    _check_can_be_made(experiment.folder())
    before = find_existing_run(experiment.folder())
    if before is None:
        return Beginning()
    if before.is_running:
        raise CommandError(
            f"the run in {before.folder} still goes on, as process {before.pid}",
            "stop that one, or give this one a folder of its own by --run_folder FOLDER",
            ExitCode.FAILED,
        )
    if before.newest_step is not None and _begins_anew(experiment, arguments):
        raise CommandError(
            f"the run in {before.folder} has checkpoints, which would go: the file has resume: "
            "never",
            "--resume never begins anew all the same; --run_folder FOLDER starts another",
        )
    if before.newest_step is None or experiment.resume != "auto":
        return Beginning()
    changes = _changes(experiment, before, arguments, allow)
    if repeats and before.is_completed and not changes:
        raise CommandError(
            f"the run in {before.folder} is completed",
            f"--run_folder FOLDER repeats it there; `{PROGRAM} evaluate {before.folder}` measures "
            "it",
        )
    return Beginning(before.newest_step, changes)


def train(
    experiment: ExperimentConfig,
    arguments: ExperimentArguments,
    begins: Beginning,
    *,
    resume_from: Path | None = None,
    as_json: bool = False,
) -> None:
    """Train what is described, and tell where it is and how it goes on.

    Args:
        experiment: what is to be trained.
        arguments: what was typed about it.
        begins: where, as :func:`beginning` has found.
        resume_from: the checkpoint to go on from, instead of the newest.
        as_json: whether to tell in JSON what became of it.

    Raises:
        RunPreempted: it was saved and stopped.
    """
    from robo_orchard_lab.experiment.existing_run import record

    folder = experiment.folder()
    given: dict[str, Any] = {} if resume_from is None else {"resume": resume_from}
    built = experiment.build(**given)
    if is_first():
        record(experiment, processes=built.accelerator.num_processes, changes=begins.changes)
    try:
        built.trainer()
    except BaseException:
        if is_first():
            _tell_stopped(folder, arguments)
        raise
    if is_first():
        _tell_end(folder, arguments, as_json)


def _check_can_be_made(folder: Path) -> None:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    wrong = "is no folder" if not there.is_dir() else "can't be written to"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(
            f"the run can't lie in {folder}: {there} {wrong}",
            "--run_folder FOLDER has it in another",
        )


def _begins_anew(experiment: ExperimentConfig, arguments: ExperimentArguments) -> bool:
    """Whether the file alone says that it does; files of others may have the name of one's run."""
    from robo_orchard_lab.experiment.overrides import from_environment

    given = [*arguments.overrides, *from_environment(os.environ, {})]
    return experiment.resume == "never" and all(each.path != ("resume",) for each in given)


def is_first() -> bool:
    """Whether this process is the first of its job, or all of it."""
    return os.environ.get("RANK", "0") == "0"


def _changes(
    experiment: ExperimentConfig,
    before: ExistingRun,
    arguments: ExperimentArguments,
    allow: str | None,
) -> list[Difference]:
    from robo_orchard_lab.experiment.existing_run import ChangedRunError, check_changes

    worst: ResumeEffect = "trajectory" if allow == "trajectory" else "harmless"
    try:
        return check_changes(experiment, before, arguments.trust, allow=worst)
    except ChangedRunError as error:
        rows = [
            [change.resume, change.field, _short(change.before), _short(change.after), change.why]
            for change in error.changes
        ]
        table = table_lines(["", "field", "was", "is", ""], rows)
        as_it_was = f"`{_command('resume', before.folder, arguments)}` goes on as it was"
        advice = f"{as_it_was}; --run_folder FOLDER starts another run"
        if error.worst != "impossible":
            advice = f"--allow trajectory goes on all the same; {advice}"
        raise CommandError("\n       ".join([error.problem, *table]), advice) from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHORTEST else text[: _SHORTEST - 3] + "..."


def _tell_end(folder: Path, arguments: ExperimentArguments, as_json: bool) -> None:
    from robo_orchard_lab.pipeline.run.run_state import read_run_state

    try:
        state = read_run_state(folder)
    except (OSError, ValueError):  # which could not be written, as the log says
        say(f"{folder}: completed")
        return
    if as_json:
        print_json({"run_folder": str(folder), **state.model_dump(mode="json")})
        return
    steps = state.progress.get("global_step_id", 0)
    why = "" if state.reason is None else f", stopped by {state.by}: {state.reason}"
    say(f"{folder}: {state.state} after {steps} steps{why}")
    if state.checkpoint is not None:
        say(f"  newest checkpoint  {Path(folder, state.checkpoint.path)}")
        say(f"  measure it         {_command('evaluate', folder, arguments)}")
        say(f"  take its weights   {PROGRAM} checkpoint export {shlex.quote(str(folder))}")


def _tell_stopped(folder: Path, arguments: ExperimentArguments) -> None:
    """What is left of a run that has not come to its end; whatever fails here is no matter."""
    from robo_orchard_lab.experiment.existing_run import find_existing_run

    try:
        found = find_existing_run(folder)
    except (OSError, ValueError):
        return
    if found is None or found.state is None:
        return
    state = found.state
    steps = state.progress.get("global_step_id", 0)
    why = "" if state.reason is None else f" ({state.reason})"
    is_saved = found.newest_step == steps
    done = "ended" if state.state != "preempted" else f"{'saved and ' * is_saved}stopped"
    note(f"{folder}: {done} after {steps} steps{why}")
    if found.newest_step is not None:
        place = "" if is_saved else f", from step {found.newest_step},"
        note(f"  go on{place} with  {_command('resume', folder, arguments)}")


def _command(name: str, folder: Path, arguments: ExperimentArguments) -> str:
    trust: Sequence[str] = [part for package in arguments.trust for part in ("--trust", package)]
    return shlex.join([PROGRAM, name, str(folder), *trust])
