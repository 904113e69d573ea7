"""``config check``: whether files are experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_lab.cli.errors import CommandError, ExitCode, line_of
from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments, ExperimentCommand
from robo_orchard_lab.cli.output import json_option, print_json, say, styled


@click.command("check", cls=ExperimentCommand)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def command(files: tuple[Path, ...], as_json: bool, experiment: ExperimentArguments) -> int:
    """Check FILES, and tell all that is wrong with them; it ends with 2 where something is.

    What a file names is imported, if it is trusted, and nothing is built.
    """
    checked = [(file, _errors(experiment, file)) for file in files]
    if as_json:
        print_json(
            [
                {"file": str(file), "ok": not errors, "errors": [*map(_plain, errors)]}
                for file, errors in checked
            ]
        )
    else:
        for file, errors in checked:
            _print(file, errors)
    return ExitCode.USAGE if any(errors for _, errors in checked) else ExitCode.DONE


def _errors(experiment: ExperimentArguments, file: Path) -> list[ConfigError | CommandError]:
    try:
        experiment.load(file)
    except CommandError as error:
        return [error]
    except ConfigError as error:
        return [error, *error.others]
    return []


def _plain(error: ConfigError | CommandError) -> dict[str, Any]:
    if isinstance(error, CommandError):
        return {"at": None, "field": None, "problem": error.problem}
    return {"at": error.source, "field": error.place or None, "problem": error.problem}


def _print(file: Path, errors: list[ConfigError | CommandError]) -> None:
    if not errors:
        say(f"{file}: {styled('ok', 'green')}")
    for error in errors:
        if isinstance(error, CommandError):
            say(f"{file}: {styled('error:', 'red')} {error.problem}")
        else:
            at = "" if (error.source or "").startswith(str(file)) else f"{file}: "
            say(f"{at}{styled('error:', 'red')} {line_of(error)}")
