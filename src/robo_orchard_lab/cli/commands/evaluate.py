"""``evaluate``: what a run has saved, on its evaluation sets."""

from __future__ import annotations

import click

from robo_orchard_lab.cli.commands.train import within
from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments, ExperimentCommand
from robo_orchard_lab.cli.output import json_option, print_json, print_table, say


@click.command("evaluate", cls=ExperimentCommand)
@click.argument("run_or_checkpoint")
@click.option(
    "--set", "sets", multiple=True, metavar="NAME", help="An evaluation set; by default all."
)
@click.option(
    "--best", is_flag=True, help="The best weights: of a KeepBest, or by checkpoint.monitor."
)
@json_option
def command(
    run_or_checkpoint: str,
    experiment: ExperimentArguments,
    sets: tuple[str, ...],
    best: bool,
    as_json: bool,
) -> None:
    """Measure the weights of a run: loss and metrics on its evaluation sets.

    RUN_OR_CHECKPOINT is the folder of a run, for its newest whole checkpoint, or one of its
    checkpoints. It is measured as the ValidationHooks of the run do; without any, it is the loss
    alone. Nothing is written.
    """
    from robo_orchard_lab.experiment.run_folder import find_run

    place = find_run(run_or_checkpoint)
    config = within(experiment, place.folder).load(place.config)
    from robo_orchard_lab.cli.training import is_first
    from robo_orchard_lab.experiment.evaluation import SavedWeights, best_weights, evaluate
    from robo_orchard_lab.experiment.existing_run import find_checkpoints

    checkpoints = find_checkpoints(run_or_checkpoint)
    if best:
        saved = best_weights(config, place.folder, checkpoints)
    else:
        saved = SavedWeights.from_checkpoint(checkpoints.pick())
    found = evaluate(config, saved, sets)
    if not is_first():
        return
    if as_json:
        print_json({"weights": str(saved.path), "step": saved.step, "metrics": found})
        return
    say(str(saved.path))
    print_table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in found.items()])
