"""``resume``: a run, from where it was stopped."""

from __future__ import annotations

import click

from robo_orchard_lab.cli.commands.train import allow_option, within
from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments, ExperimentCommand
from robo_orchard_lab.cli.output import json_option, note


@click.command("resume", cls=ExperimentCommand)
@click.argument("run")
@allow_option
@json_option
def command(run: str, experiment: ExperimentArguments, allow: str | None, as_json: bool) -> None:
    """Go on with the run in the folder RUN, from its newest whole checkpoint.

    RUN may be one of its checkpoints as well, to go on from there; what came after it goes, then.
    Fields may be changed that leave the trajectory alone, such as --trainer.max_epoch; --allow
    admits others.
    """
    from robo_orchard_lab.experiment.run_folder import find_run

    place = find_run(run)
    config = within(experiment, place.folder, resume="auto").load(place.config)
    from robo_orchard_lab.cli import training
    from robo_orchard_lab.experiment.existing_run import find_existing_run

    before = find_existing_run(place.folder)
    if before is not None and before.newest_step is None and training.is_first():
        note(f"{place.folder}: nothing was saved yet; the run begins anew")
    begins = training.beginning(config, experiment, allow=allow)
    training.train(config, experiment, begins, resume_from=place.checkpoint, as_json=as_json)
