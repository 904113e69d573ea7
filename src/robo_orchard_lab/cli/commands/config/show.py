"""``config show``: all that a file comes to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from robo_orchard_core.utils.config import Format
from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.output import (
    json_option,
    print_json,
    print_table,
    readable_yaml,
    say,
    with_escapes,
)

Place = tuple[str | int, ...]


@click.command("show", cls=ExperimentCommand)
@file_argument
@click.option(
    "--format",
    "format_",
    type=click.Choice(["yaml", "toml", "json"]),
    help="What to write it in; by default yaml.",
)
@click.option("--origins", is_flag=True, help="Tell of each value where it comes from.")
@json_option
def command(
    file: Path,
    format_: Format | None,
    origins: bool,
    as_json: bool,
    experiment: ExperimentArguments,
) -> None:
    """Show all that FILE comes to: with what it is based on, overrides and defaults.

    It is what a run keeps in its folder: train it, and it is the same run.
    """
    if origins and format_ is not None:
        raise CommandError("--origins is a table; leave out --format, or write --json")
    document = experiment.read(file)
    config = experiment.validated(document)
    if not origins:
        if as_json or format_ == "json":
            print_json(config.to_dict())
        elif format_ == "toml":
            say(with_escapes(config.to_str("toml")).rstrip("\n"))
        else:
            say(readable_yaml(config.to_dict()).rstrip("\n"))
        return
    from robo_orchard_lab.experiment.overrides import DEFAULT

    told = [
        (path, value, document.origins.get(path, DEFAULT))
        for path, value in leaves(config.to_dict())
    ]
    if as_json:
        print_json(
            [
                {"field": dotted(path), "value": value, "layer": from_.layer, "from": from_.where}
                for path, value, from_ in told
            ]
        )
    else:
        rows = [(dotted(path), _written(value), str(from_)) for path, value, from_ in told]
        print_table(["field", "value", "from"], rows)


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The values of a document that hold no others, with their places."""
    inner: Iterator[tuple[str | int, Any]] | None = None
    if isinstance(value, dict):
        inner = iter(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner = iter(enumerate(value))
    if inner is None or not value:
        yield path, value
        return
    for key, item in inner:
        yield from leaves(item, (*path, key))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
