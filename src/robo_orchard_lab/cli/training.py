"""Training runs of commands: checks before the start, reports at the end, dry runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robo_orchard_core.utils.config.errors import shorten
from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.output import (
    PROGRAM,
    bytes_text,
    count_text,
    is_watched,
    note,
    print_json,
    print_table,
    say,
    styled,
    table_lines,
)

if TYPE_CHECKING:
    from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.existing_run import ExistingRun
    from robo_orchard_lab.experiment.parts import ResumeEffect
    from robo_orchard_lab.experiment.resume_diff import Difference
    from robo_orchard_lab.pipeline import HookBasedTrainer

_VALUE_LENGTH = 60  # characters of a value in a table


@dataclass(frozen=True, slots=True)
class RunStart:
    """Start of a run.

    Attributes:
        step: Step of the checkpoint to resume from; None for a new run.
        changes: Fields that differ from the previous start.
    """

    step: int | None = None
    changes: Sequence[Difference] = ()


def is_first_rank() -> bool:
    """Return True in the first process of a job, or in a single process."""
    return os.environ.get("RANK", "0") == "0"


def check_start(
    experiment: ExperimentConfig,
    arguments: ExperimentArguments,
    *,
    allow: str | None,
    is_own_file: bool = False,
    checkpoint: Path | None = None,
) -> RunStart:
    """Return the start of a run, or refuse it because of the existing run or the run folder.

    Args:
        experiment: the experiment to train.
        arguments: arguments of the command.
        allow: "trajectory" to allow changes that change the trained weights.
        is_own_file: the file is the config.yaml in the run folder.
        checkpoint: checkpoint to resume from instead of the newest.
    """
    from robo_orchard_lab.cluster.submission import refuse_active_job
    from robo_orchard_lab.experiment.existing_run import find_existing_run
    from robo_orchard_lab.experiment.run_folder import find_escaping_link

    folder = experiment.folder()
    other_folder = "choose another folder: --run_folder FOLDER"
    if (link := find_escaping_link(folder)) is not None:
        raise CommandError(
            f"the link {link} leads out of the run folder: files would be written there",
            f"remove the link, or {other_folder}",
        )
    ancestor = next(each for each in (folder, *folder.parents) if each.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        problem = "is not a folder" if not ancestor.is_dir() else "is not writable"
        raise CommandError(f"{folder} can't be the run folder: {ancestor} {problem}", other_folder)
    refuse_active_job(folder)
    existing = find_existing_run(folder)
    if existing is None:
        return RunStart()
    if existing.is_running:
        raise CommandError(
            f"the run in {existing.folder} is still running, as process {existing.pid}",
            f"stop it, or {other_folder}",
            ExitCode.FAILED,
        )
    if existing.newest_step is None:
        return RunStart()
    if experiment.resume == "never" and not arguments.sets("resume"):
        # The file may belong to another experiment with the same run folder.
        raise CommandError(
            f"the run in {existing.folder} has checkpoints, and the file has resume: never, which "
            "would remove them",
            "pass --resume never to remove them, or --run_folder FOLDER for another run",
        )
    if experiment.resume != "auto":
        return RunStart()
    changes = _changes(experiment, existing, arguments, allow)
    _check_limits(changes, folder if checkpoint is None else checkpoint)
    if is_own_file and existing.is_completed and not changes:
        raise CommandError(
            f"the run in {existing.folder} is completed",
            f"--run_folder FOLDER repeats it there; `{PROGRAM} evaluate {existing.folder}` "
            "evaluates it",
        )
    return RunStart(existing.newest_step, changes)


def _changes(
    experiment: ExperimentConfig,
    existing: ExistingRun,
    arguments: ExperimentArguments,
    allow: str | None,
) -> list[Difference]:
    """Return the changes since the last start, or refuse them with a table."""
    from robo_orchard_lab.experiment.existing_run import ChangedRunError, check_changes

    worst: ResumeEffect = "trajectory" if allow == "trajectory" else "harmless"
    try:
        return check_changes(experiment, existing, arguments.trust, allow=worst)
    except ChangedRunError as error:
        rows = []
        for change in error.changes:
            values = (shorten(str(v), _VALUE_LENGTH) for v in (change.before, change.after))
            rows.append([change.resume, change.field, *values, change.why])
        table = table_lines(["", "field", "was", "is", ""], rows)
        resume = _command("resume", existing.folder, arguments)
        advice = f"`{resume}` resumes it unchanged; --run_folder FOLDER starts another run"
        if error.worst != "impossible":
            advice = f"--allow trajectory resumes it with the changes; {advice}"
        raise CommandError("\n       ".join([error.problem, *table]), advice) from None


def _check_limits(changes: Sequence[Difference], path: Path) -> None:
    """Refuse a changed limit that the checkpoint has passed: nothing would be trained."""
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint.listing import read_contents

    counters = {
        "trainer.max_epoch": "epoch_id",
        "trainer.max_step": "global_step_id",
        "trainer.max_optimizer_step": "optimizer_step_id",
    }
    for change in changes:
        if change.field not in counters or change.after is None:
            continue
        if change.before is not None and change.after >= change.before:
            continue
        found = find_checkpoints(path).pick()
        done = read_contents(found, tensors=False).progress.get(counters[change.field], 0)
        if done > change.after:
            raise CommandError(
                f"{change.field} is {change.after}, but {found} has completed {done}: nothing is "
                "left to train, and the run is unchanged",
                f"pass --{change.field} {done + 1} or more, or resume an earlier checkpoint",
            )


def train(
    experiment: ExperimentConfig,
    arguments: ExperimentArguments,
    start: RunStart,
    *,
    resume_from: Path | None = None,
    as_json: bool = False,
    is_quiet: bool = False,
) -> None:
    """Train an experiment; the first rank reports the result and the next commands.

    Args:
        experiment: the experiment to train.
        arguments: arguments of the command.
        start: result of :func:`check_start`.
        resume_from: checkpoint to resume from instead of the newest.
        as_json: report the result as JSON.
        is_quiet: report nothing unless the run does not complete.
    """
    from robo_orchard_lab.experiment.existing_run import record
    from robo_orchard_lab.experiment.run_folder import CONFIG_FILE

    folder = experiment.folder()
    if is_watched() and is_first_rank() and not is_quiet:  # while packages are imported
        note(styled(experiment.name, "bold", sys.stderr))
    resume: dict[str, Any] = {} if resume_from is None else {"resume": resume_from}
    built = experiment.build(**resume)
    if is_first_rank():
        processes = built.accelerator.num_processes
        recorded = record(
            experiment,
            processes=processes,
            changes=start.changes,
            initial_weights=built.initial_weights,
        )
        built.trainer.keep_files(folder / CONFIG_FILE, recorded)
    try:
        built.trainer()
    except BaseException:
        if is_first_rank():
            _report_interruption(folder, arguments, built.trainer)
        raise
    if is_first_rank() and not (is_quiet and not as_json):
        _report_result(folder, arguments, built.trainer, as_json)


def _shows_result(trainer: HookBasedTrainer) -> bool:
    """Return True if a progress bar has shown the outcome in the terminal."""
    return sys.stdout.isatty() and any(
        getattr(hook, "shows_result", False) for hook in trainer.hooks.all_hooks()
    )


def _report_result(
    folder: Path, arguments: ExperimentArguments, trainer: HookBasedTrainer, as_json: bool
) -> None:
    from robo_orchard_lab.pipeline.run.run_state import read_run_state
    from robo_orchard_lab.report.page import REPORT_FILE

    try:
        state = read_run_state(folder)
    except (OSError, ValueError):  # the log says why
        say(f"{folder}: completed")
        return
    if as_json:
        print_json({"run_folder": str(folder), **state.model_dump(mode="json")})
        return
    steps = state.progress.get("global_step_id", 0)
    reason = "" if state.reason is None else f", stopped by {state.by}: {state.reason}"
    is_short = _shows_result(trainer)
    rows = {}
    if state.checkpoint is not None:
        rows["newest checkpoint"] = str(Path(folder, state.checkpoint.path))
        if state.checkpoint.non_finite:
            rows["not finite"] = ", ".join(state.checkpoint.non_finite)
        rows["evaluate"] = _command("evaluate", folder, arguments)
        rows["export weights"] = f"{PROGRAM} checkpoint export {shlex.quote(str(folder))}"
    if (report := folder / REPORT_FILE).is_file():
        rows["report"] = str(report)
    if is_short:
        names = {"newest checkpoint": "checkpoint", "not finite": "not finite"}
        names |= {"report": "report", "evaluate": "next"}
        rows = {short: rows[name] for name, short in names.items() if name in rows}
    else:
        say(f"{folder}: {state.state} after {steps} steps{one_line(reason)}")
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        say(f"  {name:<{width}}  {text}")


def _report_interruption(
    folder: Path, arguments: ExperimentArguments, trainer: HookBasedTrainer
) -> None:
    """Report a run that did not complete; an error here must not hide the run's own error."""
    from robo_orchard_lab.experiment.existing_run import find_existing_run
    from robo_orchard_lab.report.page import REPORT_FILE

    try:
        found = find_existing_run(folder)
    except (OSError, ValueError):
        return
    if found is None or found.state is None:
        return
    state = found.state
    steps = state.progress.get("global_step_id", 0)
    reason = "" if state.reason is None else f" ({state.reason})"
    is_saved = found.newest_step == steps
    ending = "ended" if state.state != "preempted" else f"{'saved and ' * is_saved}stopped"
    if not _shows_result(trainer):
        note(f"{folder}: {ending} after {steps} steps{one_line(reason)}")
    if found.newest_step is not None:
        step = "" if is_saved else f" from step {found.newest_step}"
        note(f"  resume{step}:  {_command('resume', folder, arguments)}")
    if (report := folder / REPORT_FILE).is_file():
        note(f"  report:  {report}")


def _command(name: str, folder: Path, arguments: ExperimentArguments) -> str:
    trust: Sequence[str] = [part for package in arguments.trust for part in ("--trust", package)]
    return shlex.join([PROGRAM, name, str(folder), *trust])


def print_dry_run(experiment: ExperimentConfig, start: RunStart, *, as_json: bool) -> None:
    """Compute one batch of an experiment without writing, and describe the run."""
    from robo_orchard_lab.experiment.dry_run import dry_run

    _check_single_process("--dry-run")
    if start.step is not None:  # weights to begin with are for a new run
        experiment = experiment.model_copy(update={"init_from": None})
    found = dry_run(experiment)
    length = found.length
    if as_json:
        names = ("epochs", "steps", "updates", "steps_per_epoch")
        counts = None if length is None else {name: getattr(length, name) for name in names}
        plain = {**asdict(found), "run_folder": str(found.run_folder), "length": counts}
        print_json({**plain, "start_step": start.step})
        return

    def line(name: str, text: str) -> None:
        say(f"{name:<12} {text}")

    line("run folder", str(found.run_folder))
    changes = ", ".join(change.field for change in start.changes)
    step = f"resumes the run in this folder at step {start.step}"
    step = "new run" if start.step is None else step
    line("start", step + (f", with changed {changes}" if changes else ""))
    line("device", found.device)
    frozen = found.parameters - found.trained_parameters
    trained = f", {frozen:,} of them frozen" if frozen else ""
    line("model", count_text(found.parameters, "parameter") + trained)
    if length is None:
        line("run", "unknown length: the data has no length")
    else:
        line("epoch", count_text(length.steps_per_epoch, "step"))
        parts = [(length.epochs, "epoch"), (length.steps, "step"), (length.updates, "update")]
        line("run", ", ".join(count_text(number, noun) for number, noun in parts))
    if found.loss is not None:
        line("loss", f"{found.loss:.6g} on the first batch")
    for name, loss in found.evaluated.items():
        line(f"  {name}", f"{loss:.6g} on its first batch")
    memory = found.memory
    on = "of this process" if memory.peak_on == "process" else f"on {memory.peak_on}"
    line(
        "memory",
        f"parameters {bytes_text(memory.parameters)}, gradients {bytes_text(memory.gradients)}, "
        f"optimizer {bytes_text(memory.optimizer)}; peak {bytes_text(memory.peak)} {on}",
    )
    if found.hooks:
        say()
        rows = [
            [hook.hook, hook.field, hook.trigger, "?" if hook.times is None else f"{hook.times:,}"]
            for hook in found.hooks
        ]
        print_table(["hook", "field", "trigger", "times"], rows)
    say("\nnothing was written")


def print_fast_run(experiment: ExperimentConfig, *, as_json: bool) -> None:
    """Run two steps of each stage in a temporary folder, and list the stages."""
    from robo_orchard_lab.experiment.dry_run import fast_run

    _check_single_process("--debug-fast")
    done = fast_run(experiment)
    if as_json:
        print_json({"done": done})
        return
    for line in done:
        say(line)
    say("nothing was kept")


def _check_single_process(option: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CommandError(f"{option} is for one process; run it without torchrun")
