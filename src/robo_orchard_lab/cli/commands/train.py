"""Commands ``train``, ``resume``, ``evaluate`` and ``prove-resume``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from robo_orchard_lab.cli import training
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    allow_option,
    file_argument,
)
from robo_orchard_lab.cli.output import json_option, note, print_json, print_table, say
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, run_config_file


@click.command("train", cls=ExperimentCommand, lists_fields=True)
@file_argument
@allow_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Build everything, compute one batch, describe the run; write nothing.",
)
@click.option(
    "--debug-fast",
    is_flag=True,
    help="Run two steps of training, evaluation, saving and resuming in a temporary folder.",
)
@json_option
def train(
    file: Path,
    experiment: ExperimentArguments,
    allow: str | None,
    dry_run: bool,
    debug_fast: bool,
    as_json: bool,
) -> None:
    """Train the experiment of FILE in its run folder.

    \b
      robo-orchard-lab train experiment.yaml
      robo-orchard-lab train experiment.yaml --trainer.max_epoch 3 --optimizer.lr=0.05
      robo-orchard-lab train experiment.yaml --dry-run
      torchrun --nproc-per-node 2 -m robo_orchard_lab train experiment.yaml

    If the run folder has a run, the command resumes it from the newest checkpoint, unless a changed
    field changes the trained weights; --resume never starts from the beginning. FILE may also be
    the config.yaml of a run: with --run_folder FOLDER, it repeats the run in another folder.
    """
    if dry_run and debug_fast:
        raise CommandError("expected one of --dry-run and --debug-fast, found both")
    own_folder = _run_folder_of(file)
    if own_folder is not None and not experiment.sets("run_folder"):
        experiment = experiment.within(own_folder)
    config = experiment.load(file)
    if debug_fast:
        return training.print_fast_run(config, as_json=as_json)
    is_own_file = own_folder is not None and config.folder().resolve() == own_folder.resolve()
    start = training.check_start(config, experiment, allow=allow, is_own_file=is_own_file)
    if dry_run:
        return training.print_dry_run(config, start, as_json=as_json)
    return training.train(config, experiment, start, as_json=as_json)


def _run_folder_of(file: Path) -> Path | None:
    """Return the run folder if a file is the config.yaml of a run."""
    is_config = file.name == CONFIG_FILE and run_config_file(file.parent) is not None
    return file.parent if is_config else None


@click.command("resume", cls=ExperimentCommand)
@click.argument("run")
@allow_option
@json_option
def resume(run: str, experiment: ExperimentArguments, allow: str | None, as_json: bool) -> None:
    """Resume the run in the folder RUN from its newest intact checkpoint.

    \b
      robo-orchard-lab resume runs/spirals
      robo-orchard-lab resume runs/spirals --trainer.max_epoch 10
      robo-orchard-lab resume runs/spirals/checkpoints/step_00000010

    RUN may also be a checkpoint: the run resumes there, and later checkpoints are removed. Fields
    that do not change the trained weights may be changed, such as --trainer.max_epoch; --allow
    permits other changes.
    """
    from robo_orchard_lab.experiment.existing_run import find_existing_run
    from robo_orchard_lab.experiment.run_folder import find_run

    found = find_run(run)
    config = experiment.within(found.folder, resume="auto").load(found.config)
    existing = find_existing_run(found.folder)
    if existing is not None and existing.newest_step is None and training.is_first_rank():
        note(f"{found.folder}: no checkpoint yet; the run starts from the beginning")
    start = training.check_start(config, experiment, allow=allow, checkpoint=found.checkpoint)
    training.train(config, experiment, start, resume_from=found.checkpoint, as_json=as_json)


@click.command("evaluate", cls=ExperimentCommand)
@click.argument("run_or_checkpoint")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME",
    help="Evaluation set to evaluate; repeatable; all sets by default.",
)
@click.option(
    "--best",
    is_flag=True,
    help="Evaluate the best weights: those of a KeepBest hook, or by checkpoint.monitor.",
)
@json_option
def evaluate(
    run_or_checkpoint: str,
    experiment: ExperimentArguments,
    sets: tuple[str, ...],
    best: bool,
    as_json: bool,
) -> None:
    """Evaluate the weights of a run: loss and metrics on its evaluation sets.

    \b
      robo-orchard-lab evaluate runs/spirals
      robo-orchard-lab evaluate runs/spirals --best --set val
      robo-orchard-lab evaluate runs/spirals/checkpoints/step_00000010

    RUN_OR_CHECKPOINT is the folder of a run, for its newest intact checkpoint, or a checkpoint.
    The metrics are those of the run's ValidationHooks; without such a hook, the loss alone. Nothing
    is written.
    """
    from robo_orchard_lab.experiment import evaluation
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.experiment.run_folder import find_run

    found = find_run(run_or_checkpoint)
    config = experiment.within(found.folder).load(found.config)
    checkpoints = find_checkpoints(run_or_checkpoint)
    if best:
        weights = evaluation.best_weights(config, found.folder, checkpoints)
    else:
        weights = evaluation.SavedWeights.from_checkpoint(checkpoints.pick())
    metrics = evaluation.evaluate(config, weights, sets)
    if not training.is_first_rank():
        return
    if as_json:
        print_json({"weights": str(weights.path), "step": weights.step, "metrics": metrics})
        return
    say(str(weights.path))
    print_table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in metrics.items()])


@click.command("prove-resume", cls=ExperimentCommand)
@file_argument
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Length of both runs in steps, if FILE does not end them earlier.",
)
@click.option(
    "--stops",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of stops of the second run, evenly spread.",
)
@click.option("--kill", is_flag=True, help="Kill processes at random instants instead.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="World size of both runs.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="NAME",
    help="File in the run folder that must be identical at the end, such as metrics.jsonl; "
    "repeatable.",
)
@json_option
def prove_resume(
    file: Path,
    experiment: ExperimentArguments,
    steps: int,
    stops: int,
    kill: bool,
    processes: int,
    files: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run FILE uninterrupted and with stops in new processes; compare both runs.

    \b
      robo-orchard-lab prove-resume experiment.yaml
      robo-orchard-lab prove-resume experiment.yaml --steps 50 --stops 10 --file metrics.jsonl
      robo-orchard-lab prove-resume experiment.yaml --kill

    Compared step by step, bit for bit: samples, losses, weights, the states of optimizer, LR
    scheduler, hooks and random generators, and events. Both runs use temporary folders. Exits with
    1 if the runs differ, and prints the first difference.
    """
    config = experiment.load(file)
    if kill and config.checkpoint is None:
        raise CommandError(
            "a run that is killed must save, and checkpoint is null", "remove checkpoint: null"
        )
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.dry_run import build_for_resume_proof, spread_stops
    from robo_orchard_lab.testing import StraightRunError
    from robo_orchard_lab.testing import prove_resume as prove

    at = spread_stops(steps, stops)
    trust = [*ExperimentTrust.of(experiment.trust).names]
    source = partial(build_for_resume_proof, document=config.to_dict(), trust=trust)
    try:
        proof = prove(source, steps, at, kill=kill, files=files, processes=processes)
    except StraightRunError as error:
        raise CommandError(str(error), exit_code=ExitCode.FAILED) from error
    if proof.steps <= at[-1]:
        note(
            f"the run ends after {proof.steps} steps; pass --steps {proof.steps} to stop it earlier"
        )
    if as_json:
        print_json({"passed": proof.passed, **asdict(proof)})
    else:
        say(str(proof))
    return ExitCode.DONE if proof.passed else ExitCode.FAILED
