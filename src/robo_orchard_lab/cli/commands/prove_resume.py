"""``prove-resume``: that a run goes on exactly where it was stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.output import json_option, note, print_json, say


@click.command("prove-resume", cls=ExperimentCommand)
@file_argument
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="After how many steps the runs end, where FILE has no earlier end for them.",
)
@click.option(
    "--stops",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How often one of them is stopped, evenly spread.",
)
@click.option("--kill", is_flag=True, help="Kill processes at random instants instead.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many ranks each run has.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="NAME",
    help="A file in the run's folder that has to be the same at the end, such as metrics.jsonl.",
)
@json_option
def command(
    file: Path,
    experiment: ExperimentArguments,
    steps: int,
    stops: int,
    kill: bool,
    processes: int,
    files: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run FILE straight through, and again with stops in fresh processes, and compare the two.

    Compared, step by step and bit for bit, are samples, losses, weights, the states of optimizer,
    schedule, hooks and random generators, and events. Both write to folders that are removed. Ends
    with 1 where they differ, and tells the first difference.
    """
    config = experiment.load(file)
    if kill and config.checkpoint is None:
        raise CommandError("a run that is killed has to save, and checkpoint is null")
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.dry_run import build, spread_stops
    from robo_orchard_lab.testing import StraightRunError, prove_resume

    at = spread_stops(steps, stops)
    make = partial(
        build, document=config.to_dict(), trust=[*ExperimentTrust.of(experiment.trust).names]
    )
    try:
        proof = prove_resume(make, steps, at, kill=kill, files=files, processes=processes)
    except StraightRunError as error:
        raise CommandError(str(error), exit_code=ExitCode.FAILED) from error
    if proof.steps <= at[-1]:
        note(f"the run ends after {proof.steps} steps; --steps {proof.steps} stops it within these")
    if as_json:
        print_json(
            {
                "passed": proof.passed,
                "steps": proof.steps,
                "stops": [*proof.stops],
                "kills": proof.kills,
                "values": proof.values,
                "differences": [
                    {"step": d.step, "name": d.name, "straight": d.straight, "resumed": d.resumed}
                    for d in proof.differences
                ],
            }
        )
    else:
        say(str(proof))
    return ExitCode.DONE if proof.passed else ExitCode.FAILED
