"""``checkpoint prune``."""

from __future__ import annotations

from typing import Any

import click

from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import json_option, print_json, print_table

_NUMBER = click.IntRange(min=1)


@click.command("prune", cls=Command)
@click.argument("path")
@click.option("--keep-last", type=_NUMBER, help="Keep so many of the newest.")
@click.option("--keep-every", type=_NUMBER, help="Keep those at every so many steps.")
@click.option("--keep-best", type=_NUMBER, help="Keep so many of those that are best by --monitor.")
@click.option("--monitor", help="The metric for --keep-best, such as eval/val/loss.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="What of --monitor is best.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def command(path: str, dry_run: bool, as_json: bool, **rules: Any) -> None:
    """Remove the checkpoints of a run that no rule keeps; the newest whole one always stays.

    PATH is the folder of a run, or of its checkpoints. What is not said here is as the run's file
    says in `checkpoint`. Refused while the run goes on.
    """
    from robo_orchard_lab.experiment.existing_run import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

    place = find_checkpoints(path)
    given = {name: value for name, value in rules.items() if value is not None}
    retention = place.retention(**given)
    if retention.keep_last is None:
        raise CommandError(
            f"nothing says how many checkpoints in {place.root} are to stay", "give --keep-last N"
        )
    store = CheckpointStore(place.root, retention=retention)
    if dry_run:
        decisions = store.prune(dry_run=True)
    else:
        with store:
            decisions = store.prune()
    if as_json:
        print_json([{"path": str(d.path), "removed": d.removed, "why": d.why} for d in decisions])
        return
    removed = "would be removed" if dry_run else "removed"
    rows = [[d.path.name, removed if d.removed else "stays", d.why] for d in decisions]
    print_table(["checkpoint", "", "why"], rows)
