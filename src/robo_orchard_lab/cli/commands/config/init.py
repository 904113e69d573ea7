"""``config init``: a file to begin with."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

import click

from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import PROGRAM, say

_SUFFIXES = (".yaml", ".yml")


@click.command("init", cls=Command)
@click.argument("file", default="experiment.yaml", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Write a commented FILE to begin with (experiment.yaml); it trains as it is, in seconds.

    A file that is there is left as it is.
    """
    if file.suffix not in _SUFFIXES:
        raise CommandError(f"{file}: the file has comments, and so is YAML; name it {_yaml(file)}")
    text = files("robo_orchard_lab.cli").joinpath("starting_file.yaml").read_text("utf-8")
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(text.replace("experiment.yaml", shlex.quote(str(file))))
    except FileExistsError:
        raise CommandError(
            f"{file} is there already, and is left as it is", "name another file"
        ) from None
    except OSError as error:
        raise CommandError(f"{file} can't be written: {error.strerror}") from error
    say(f"wrote {file}; to train it: {PROGRAM} train {shlex.quote(str(file))}")


def _yaml(file: Path) -> Path:
    return file.with_suffix(".yaml")
