"""``train``: what a file describes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.experiment_arguments import (
    ALLOWED,
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.output import PROGRAM, json_option
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, run_config_file

RUN_FOLDER = "run_folder"

allow_option = click.option(
    "--allow",
    type=click.Choice([ALLOWED]),
    help="Go on with a run although its file has changed in what its weights follow from; "
    "--allow alone means the same.",
)


@click.command("train", cls=ExperimentCommand, lists_fields=True)
@file_argument
@allow_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Build all, compute one batch, tell what would be; write nothing.",
)
@click.option(
    "--debug-fast", is_flag=True, help="Run two steps of everything in a folder that is removed."
)
@json_option
def command(
    file: Path,
    experiment: ExperimentArguments,
    allow: str | None,
    dry_run: bool,
    debug_fast: bool,
    as_json: bool,
) -> None:
    """Train what FILE describes, in the run folder that it names.

    Where the folder has a run, that goes on from its newest checkpoint, once nothing has changed
    that matters; --resume never begins anew. The config.yaml of a run's folder is a FILE, too, and
    repeats the run in another --run_folder. Under torchrun, write
    `torchrun --nproc-per-node 2 -m robo_orchard_lab train FILE`.
    """
    if dry_run and debug_fast:
        raise CommandError("--dry-run and --debug-fast are two ways to try it; give one of them")
    own_folder = _run_of(file)
    if own_folder is not None and not _has_run_folder(experiment):
        experiment = within(experiment, own_folder)
    config = experiment.load(file)
    from robo_orchard_lab.cli import training
    from robo_orchard_lab.cli import training as trial

    if debug_fast:
        return trial.show_fast_run(config, as_json=as_json)
    repeats = own_folder is not None and config.folder().resolve() == own_folder.resolve()
    begins = training.beginning(config, experiment, allow=allow, repeats=repeats)
    if dry_run:
        return trial.show_dry_run(config, begins, as_json=as_json)
    return training.train(config, experiment, begins, as_json=as_json)


def within(arguments: ExperimentArguments, folder: Path, **fields: str) -> ExperimentArguments:
    """The same, for the run in a folder that was typed.

    Raises:
        CommandError: another one is given as well.
    """
    from robo_orchard_lab.experiment.overrides import Origin, Override

    if any(override.path[0] == RUN_FOLDER for override in arguments.overrides):
        raise CommandError(
            f"the run is in {folder}, and --{RUN_FOLDER} names another folder",
            f"`{PROGRAM} train {folder / CONFIG_FILE} --{RUN_FOLDER} FOLDER` repeats it there",
        )
    said = {RUN_FOLDER: str(folder), **fields}
    found = [
        Override((name,), value, None, Origin("command line", str(folder)))
        for name, value in said.items()
    ]
    return replace(arguments, overrides=(*found, *arguments.overrides))


def _run_of(file: Path) -> Path | None:
    """The folder of a run that a file is the `config.yaml` of, if it is one's."""
    is_one = file.name == CONFIG_FILE and run_config_file(file.parent) is not None
    return file.parent if is_one else None


def _has_run_folder(arguments: ExperimentArguments) -> bool:
    from robo_orchard_lab.experiment.overrides import from_environment

    given = [*arguments.overrides, *from_environment(os.environ, {})]
    return any(override.path[0] == RUN_FOLDER for override in given)
