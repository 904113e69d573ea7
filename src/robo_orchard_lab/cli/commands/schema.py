"""``schema``: by which editors complete and check the files of experiments."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.experiment_arguments import trust_option
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import print_json, say


@click.command("schema", cls=Command)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write it to, which is replaced; by default it is printed.",
)
@trust_option
def command(output: Path | None, trust: tuple[str, ...]) -> None:
    """Write the JSON Schema of experiment files, by which editors complete and check them.

    Of your own classes, those are in it with their fields that are trusted by their names, as in
    --trust my_team.hooks:Greeter; of a package that is trusted, any name is admitted.

    \b
    For a YAML file, many editors take it from a line at its top:
      # yaml-language-server: $schema=experiment.schema.json
    """
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.schema import experiment_schema

    trusted = ExperimentTrust.of(trust)
    trusted.make_local_modules_importable()
    schema = experiment_schema(trust=trusted.names)
    if output is None:
        print_json(schema)
        return
    try:
        output.write_text(json.dumps(schema) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{output} can't be written: {error.strerror}") from error
    say(f"wrote {output}")
