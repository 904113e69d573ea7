"""``checkpoint export``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import json_option, print_json, say


@click.command("export", cls=Command)
@click.argument("path")
@click.argument("file", default="model.safetensors", type=click.Path())
@click.option("--best", is_flag=True, help="Take the best one, by the run's checkpoint.monitor.")
@click.option("--force", is_flag=True, help="Replace FILE if there is one.")
@json_option
def command(path: str, file: str, best: bool, force: bool, as_json: bool) -> None:
    """Write the weights of a checkpoint as one safetensors file.

    PATH is a checkpoint, or the folder of a run, for its newest whole one. FILE is
    model.safetensors by default; `safetensors.torch.load_file` reads it, by the names that the
    plain model has. Weights that were saved in shards are put together.
    """
    from robo_orchard_lab.experiment.existing_run import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import export_weights

    target = Path(file)
    if target.suffix != ".safetensors":
        raise CommandError(f"expected a name that ends in .safetensors, found {file!r}")
    if os.path.lexists(target) and not force:
        raise CommandError(f"{target} is there already", "--force replaces it")
    if not target.parent.is_dir():
        raise CommandError(f"there is no folder {target.parent}")
    found = find_checkpoints(path).pick(best=best)
    export_weights(found, target)
    if as_json:
        print_json({"checkpoint": str(found), "file": str(target)})
    else:
        say(f"the weights of {found} are in {target}")
