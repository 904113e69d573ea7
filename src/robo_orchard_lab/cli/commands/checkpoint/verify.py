"""``checkpoint verify``."""

from __future__ import annotations

import click

from robo_orchard_lab.cli.errors import ExitCode
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import json_option, print_json, say, styled, visible


@click.command("verify", cls=Command)
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> int:
    """Read checkpoints, and compare every file with the digest that it was written with.

    PATH is the folder of a run, of its checkpoints, or one checkpoint. Ends with 1 where one is
    damaged, or there is none.
    """
    from robo_orchard_lab.experiment.existing_run import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

    place = find_checkpoints(path)
    found = [*CheckpointStore(place.root).verify(place.chosen)]
    if as_json:
        print_json([{"path": str(each.path), "problem": each.problem} for each in found])
    else:
        for each in found:
            state = styled("whole", "green") if each.problem is None else styled("damaged", "red")
            problem = "" if each.problem is None else f": {visible(each.problem)}"
            say(f"{visible(str(each.path))}: {state}{problem}")
        if not found:
            say(f"there are no checkpoints in {place.root}")
    is_good = found and all(each.problem is None for each in found)
    return ExitCode.DONE if is_good else ExitCode.FAILED
