"""Arguments of commands for an experiment: FILE, ``--trust``, and any field as an option.

A field option overrides the value of the file before validation, also a field of a named hook or of
a configured class::

    robo-orchard-lab train digits.yaml --trainer.max_epoch 3 --hooks.log.every "50 steps"
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.output import PROGRAM
from robo_orchard_lab.experiment.inspection import experiment_fields
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.document import ExperimentDocument
    from robo_orchard_lab.experiment.overrides import Override

RUN_FOLDER = "run_folder"
FILE_SUFFIXES = (".yaml", ".yml", ".toml", ".json")

file_argument = click.argument("file", type=click.Path(path_type=Path))
"""Argument FILE; the command that reads the file reports its errors."""

_TRUST: dict[str, Any] = {
    "multiple": True,
    "metavar": "PACKAGE",
    "help": "Allow the file to name code of this package (or module:Class); repeatable. Other code "
    "is never imported. For a project: trust in [tool.robo_orchard_lab] of pyproject.toml.",
}
trust_option = click.option("--trust", **_TRUST)
"""Option ``--trust`` of commands without field options."""

ALLOWED = "trajectory"
"""The only value of ``--allow``."""
allow_option = click.option(
    "--allow",
    type=click.Choice([ALLOWED]),
    help="Resume although a changed field changes the trained weights, as in `--allow trajectory`; "
    "`--allow` alone means the same.",
)


@dataclass(frozen=True)
class ExperimentArguments:
    """Trusted packages and field overrides from the command line."""

    trust: tuple[str, ...] = ()
    """Values of ``--trust``; the user's pyproject.toml may add others."""
    overrides: tuple[Override, ...] = ()

    def read(self, file: Path) -> ExperimentDocument:
        """Read a file and apply the environment variables and the overrides."""
        from robo_orchard_lab.experiment.document import read_experiment

        if not os.path.lexists(file):
            raise CommandError(f"there is no file {file}", _nearest_file(file))
        return read_experiment(file, overrides=self.overrides, environ=os.environ)

    def load(self, file: Path, *, all_errors: bool = False) -> ExperimentConfig:
        """Read and validate a file; ``all_errors`` is as in `ExperimentConfig.from_document`."""
        return self.validated(self.read(file), all_errors=all_errors)

    def validated(
        self, document: ExperimentDocument, *, all_errors: bool = False
    ) -> ExperimentConfig:
        """Validate a document; each error has its location."""
        from robo_orchard_lab.experiment.config import ExperimentConfig

        with _located(document):
            return ExperimentConfig.from_document(document, self.trust, all_errors=all_errors)

    def check(self, document: ExperimentDocument) -> None:
        """Check a document without an import of the code that it names."""
        from robo_orchard_lab.experiment.config import ExperimentConfig

        with _located(document):
            ExperimentConfig.check_document(document, self.trust)

    def sets(self, field: str) -> bool:
        """Return True if the command line or the environment sets a field of the top."""
        from robo_orchard_lab.experiment.overrides import from_environment

        overrides = [*self.overrides, *from_environment(os.environ, {})]
        return any(override.path[0] == field for override in overrides)

    def with_field(self, path: str, value: str, option: str) -> ExperimentArguments:
        """Return these arguments with a further field, set by an option of another name."""
        from robo_orchard_lab.experiment.overrides import Origin, Override

        added = Override(tuple(path.split(".")), value, None, Origin("command line", option))
        return replace(self, overrides=(added, *self.overrides))

    def with_argument(self, argument: str) -> ExperimentArguments:
        """Return these arguments with a further one, as typed: ``--optimizer.lr=0.1``."""
        return replace(self, overrides=(*self.overrides, *_overrides([argument])))

    def within(self, folder: Path, **fields: str) -> ExperimentArguments:
        """Return these arguments for the run in a folder, with further fields."""
        from robo_orchard_lab.experiment.overrides import Origin, Override

        if any(override.path[0] == RUN_FOLDER for override in self.overrides):
            raise CommandError(
                f"the run is in {folder}, and --{RUN_FOLDER} names another folder",
                f"`{PROGRAM} train {folder / CONFIG_FILE} --{RUN_FOLDER} FOLDER` repeats it there",
            )
        origin = Origin("command line", str(folder))
        fields = {RUN_FOLDER: str(folder), **fields}
        added = [Override((name,), value, None, origin) for name, value in fields.items()]
        return replace(self, overrides=(*added, *self.overrides))


@contextmanager
def _located(document: ExperimentDocument) -> Iterator[None]:
    """Locate the further errors of an error of the body, too."""
    try:
        yield
    except ConfigError as error:
        for other in error.others:
            document.locate(other)
        raise


class ExperimentCommand(Command):
    """Command with ``--trust`` and field options, passed as ``experiment: ExperimentArguments``.

    Args:
        lists_fields: list all fields in the help.
    """

    def __init__(self, *args: Any, lists_fields: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lists_fields = lists_fields
        self.options_metavar = "[OPTIONS] [--FIELD VALUE ...]"
        self.params.insert(-1, click.Option(["--trust"], **_TRUST))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse field options; click parses the rest."""
        own, fields = self._split(ctx, args)
        rest = super().parse_args(ctx, own)
        trust = ctx.params.pop("trust")
        if not ctx.resilient_parsing:
            ctx.params["experiment"] = ExperimentArguments(trust, _overrides(fields))
        return rest

    def _split(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        """Split arguments into those for click and fields, each as ``--path=value``."""
        requires_value = {
            name: not (option.is_flag or option.count)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option)
            for name in (*option.opts, *option.secondary_opts)
        }
        own: list[str] = []
        fields: list[str] = []
        waiting = iter(_with_allow_value(args))
        for argument in waiting:
            if argument == "--":
                own += [argument, *waiting]
            elif argument in requires_value:
                own += [argument, *islice(waiting, requires_value[argument])]
            elif not argument.startswith("--") or argument.partition("=")[0] in requires_value:
                own.append(argument)
            elif ctx.resilient_parsing:  # shell completion of a later argument
                if "=" not in argument:
                    next(waiting, None)
            else:
                fields.append(_with_value(argument, waiting, [*requires_value]))
        return own, fields

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete options, fields and arguments."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            found += [
                CompletionItem(f"--{field.path}", help=field.description)
                for field in experiment_fields()
                if f"--{field.path}".startswith(incomplete)
            ]
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options and the fields, or a line about fields."""
        super().format_options(ctx, formatter)
        if not self._lists_fields:
            with formatter.section("Fields"):
                formatter.write_text(
                    "Any field of the experiment, as in --trainer.max_epoch 3 or --hooks.bar=null; "
                    "`robo-orchard-lab train --help` lists the fields."
                )
            return
        with formatter.section("Fields (--FIELD VALUE overrides the file)"):
            formatter.write_dl([(f"--{field.path}", field.text) for field in experiment_fields()])
        with formatter.section("More about fields"):
            formatter.write_text(
                "Parameters of a configured class are fields, too: --optimizer.lr 0.1, "
                "--hooks.NAME.every '50 steps'; `robo-orchard-lab hooks show NAME` lists those of "
                "a hook. null removes a hook or an evaluation set. Write --FIELD=VALUE for a value "
                "that starts with two dashes. An environment variable overrides the file, an "
                "option overrides both: ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH=3."
            )


def _with_allow_value(args: list[str]) -> list[str]:
    """Add the only value to ``--allow`` without a value: click would use the next argument."""

    def is_value(argument: str) -> bool:
        path = Path(argument)
        return not (argument[:1] in ("", "-") or path.suffix in FILE_SUFFIXES or path.exists())

    following = [*args[1:], ""]
    return [
        f"--allow={ALLOWED}" if arg == "--allow" and not is_value(after) else arg
        for arg, after in zip(args, following, strict=False)
    ]


def _with_value(argument: str, waiting: Iterator[str], options: list[str]) -> str:
    """Return a field and its value, the next argument, as a single argument."""
    name, has_value, _ = argument.partition("=")
    word = name.removeprefix("--")
    top, _, rest = word.partition(".")
    paths = [field.path for field in experiment_fields()]
    tops = {path.partition(".")[0] for path in paths}
    if top not in tops:
        known = [*(option.removeprefix("--") for option in options), *paths]
        near = difflib.get_close_matches(word, known, n=1)
        if not near and rest:  # a field of a configured class: only the first key is known
            near = [f"{each}.{rest}" for each in difflib.get_close_matches(top, tops, n=1)]
        advice = f"did you mean --{near[0]}?" if near else "see --help"
        raise click.UsageError(f"there is no option or field {name}; {advice}")
    if has_value:
        return argument
    value = next(waiting, None)
    if value is None or value.startswith("--"):
        raise click.UsageError(f"{name} requires a value, as in {name}=VALUE")
    return f"{argument}={value}"


def _overrides(fields: list[str]) -> tuple[Override, ...]:
    if not fields:  # without an import
        return ()
    from robo_orchard_lab.experiment.overrides import from_arguments

    return tuple(from_arguments(fields)[0])


def _nearest_file(file: Path) -> str:
    try:
        names = [each.name for each in file.parent.iterdir() if each.suffix in FILE_SUFFIXES]
    except OSError:
        return ""
    near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
    return f"did you mean {file.with_name(near[0])}?" if near else ""
