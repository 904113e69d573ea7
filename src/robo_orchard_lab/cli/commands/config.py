"""Commands ``config`` (init, check, show, diff) and ``schema``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import click

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_core.utils.config.errors import dotted, shorten
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.cli.commands import Command, CommandGroup
from robo_orchard_lab.cli.errors import (
    CommandError,
    ExitCode,
    check_target,
    config_error_line,
)
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
    trust_option,
)
from robo_orchard_lab.cli.output import (
    PROGRAM,
    json_option,
    print_json,
    print_table,
    readable_yaml,
    say,
    styled,
    with_escapes,
)

_VALUE_LENGTH = 48  # characters of a value in a table of differences


@click.group("config", cls=CommandGroup)
def config() -> None:
    """Create, check, show and compare experiment files."""


@config.command("init")
@click.argument("file", default="experiment.yaml", type=click.Path(path_type=Path))
def init(file: Path) -> None:
    """Write a commented example FILE.

    \b
      robo-orchard-lab config init
      robo-orchard-lab config init digits.yaml

    FILE is experiment.yaml by default. Its experiment trains in seconds. An existing file is never
    replaced.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise CommandError(
            f"{file}: expected the name of a YAML file, since the example has comments",
            f"name it {file.with_suffix('.yaml')}",
        )
    text = resources("robo_orchard_lab.cli").joinpath("starting_file.yaml").read_text("utf-8")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text.replace("experiment.yaml", shlex.quote(str(file))))
    except FileExistsError:
        raise CommandError(f"{file} already exists", "name another file") from None
    except OSError as error:
        raise CommandError(f"{file} can't be written: {error.strerror}") from error
    say(f"wrote {file}; to train it: {PROGRAM} train {shlex.quote(str(file))}")


@config.command("check", cls=ExperimentCommand)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def check(files: tuple[Path, ...], as_json: bool, experiment: ExperimentArguments) -> int:
    """Check FILES and print all errors.

    \b
      robo-orchard-lab config check experiment.yaml
      robo-orchard-lab config check *.yaml --json

    Exits with 2 if a file has errors. Errors that need no import are printed first. Then the
    trusted code that the file names is imported, to check its arguments; nothing is built.
    """
    report = []
    for file in files:
        errors: list[dict[str, Any]] = []
        for error in _errors(file, experiment):
            at, field, line = None, None, error.problem
            if isinstance(error, ConfigError):
                at, field, line = error.source, error.location or None, config_error_line(error)
            found = {"at": at, "field": field, "problem": error.problem}
            if found in errors:
                continue
            errors.append(found)
            if not as_json:
                place = "" if (at or "").startswith(str(file)) else f"{file}: "
                say(f"{place}{styled('error:', 'red')} {line}", flush=True)
        if not errors and not as_json:
            say(f"{file}: {styled('ok', 'green')}")
        report.append({"file": str(file), "ok": not errors, "errors": errors})
    if as_json:
        print_json(report)
    return ExitCode.DONE if all(each["ok"] for each in report) else ExitCode.USAGE


def _errors(file: Path, experiment: ExperimentArguments) -> Iterator[CommandError | ConfigError]:
    """Iterate over the errors of a file, those that need no import first; some come twice."""
    try:
        document = experiment.read(file)
    except (CommandError, ConfigError) as error:
        yield from (error, *getattr(error, "others", ()))
        return
    for check in (experiment.check, partial(experiment.validated, all_errors=True)):
        try:
            check(document)
        except ConfigError as error:
            yield from (error, *error.others)


@config.command("show", cls=ExperimentCommand)
@file_argument
@click.option(
    "--format",
    "format_",
    type=click.Choice(["yaml", "toml", "json"]),
    help="Format of the output; YAML by default.",
)
@click.option("--origins", is_flag=True, help="Print a table with the origin of each value.")
@json_option
def show(
    file: Path,
    format_: str | None,
    origins: bool,
    as_json: bool,
    experiment: ExperimentArguments,
) -> None:
    """Show the complete experiment of FILE, with bases, overrides and defaults.

    \b
      robo-orchard-lab config show wide.yaml
      robo-orchard-lab config show wide.yaml --trainer.max_epoch 3 --origins

    The output is an experiment file of the same run, as a run keeps it in its folder.
    """
    if origins and format_ is not None:
        raise CommandError("--origins is a table without a format", "omit --format, or pass --json")
    document = experiment.read(file)
    complete = experiment.validated(document)
    if origins:
        from robo_orchard_lab.experiment.overrides import DEFAULT, leaves

        found = [
            (dotted(path), value, document.origins.get(path, DEFAULT))
            for path, value in leaves(complete.to_dict())
        ]
        if as_json:
            print_json(
                [
                    {"field": field, "value": value, "layer": origin.layer, "from": origin.where}
                    for field, value, origin in found
                ]
            )
        else:
            rows = [(field, _text(value), str(origin)) for field, value, origin in found]
            print_table(["field", "value", "from"], rows)
    elif as_json or format_ == "json":
        print_json(complete.to_dict())
    elif format_ == "toml":
        say(with_escapes(complete.to_str("toml")).rstrip("\n"))
    else:
        say(readable_yaml(complete.to_dict()).rstrip("\n"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@config.command("diff", cls=ExperimentCommand)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
def diff(before: Path, after: Path, as_json: bool, experiment: ExperimentArguments) -> None:
    """Show the differences between BEFORE and AFTER, and whether a run can resume.

    \b
      robo-orchard-lab config diff experiment.yaml wide.yaml
      robo-orchard-lab config diff runs/spirals/config.yaml experiment.yaml --optimizer.lr 0.1

    A run of BEFORE can resume as AFTER if all differences are "harmless". A "trajectory" difference
    changes the trained weights; an "impossible" one prevents a resume. Field options override AFTER
    alone.
    """
    from robo_orchard_lab.experiment.resume_diff import differences

    plain = replace(experiment, overrides=())
    found = differences(plain.load(before).to_dict(), experiment.load(after).to_dict())
    if as_json:
        plain_differences = ({"field": each.field, **asdict(each)} for each in found)
        print_json([{k: v for k, v in each.items() if k != "path"} for each in plain_differences])
    elif not found:
        say("no difference")
    else:
        rows = [
            (each.field, _part_text(each.before), _part_text(each.after), each.resume, each.why)
            for each in found
        ]
        print_table(["field", "before", "after", "resume", "because"], rows)


def _part_text(value: Any) -> str:
    """Return a short text for a value; for a configured class, its name."""
    for key in PART_KEYS if isinstance(value, dict) else ():
        if isinstance(name := value.get(key), str):
            return f"{name.rpartition(':')[2]} ..."
    return shorten(_text(value), _VALUE_LENGTH)


@click.command("schema", cls=Command)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, which is replaced; standard output by default.",
)
@trust_option
def schema(output: Path | None, trust: tuple[str, ...]) -> None:
    """Write the JSON Schema of experiment files, for completion and checks in editors.

    \b
      robo-orchard-lab schema --output experiment.schema.json
      robo-orchard-lab schema --trust my_team.hooks:Greeter

    The schema has the fields of your own classes that you trust by name, as in
    --trust my_team.hooks:Greeter. Of a trusted package, it accepts any class.

    \b
    Many editors read the schema of a YAML file from its first line:
      # yaml-language-server: $schema=experiment.schema.json
    """
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.schema import experiment_schema

    if output is not None:
        check_target(output, force=True)
    trusted = ExperimentTrust.of(trust)
    trusted.make_local_modules_importable()
    document = experiment_schema(trust=trusted.names)
    if output is None:
        print_json(document)
        return
    try:
        output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{output} can't be written: {error.strerror}") from error
    say(f"wrote {output}")
