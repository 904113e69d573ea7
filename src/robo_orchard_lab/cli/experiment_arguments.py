"""Arguments of commands for an experiment: FILE, ``--trust``, and any field as an option.

A field option overrides the value of the file before validation, also a field of a named hook or of
a configured class::

    robo-orchard-lab train digits.yaml --trainer.max_epoch 3 --hooks.log.every "50 steps"
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
_SUFFIXES = (".yaml", ".yml", ".toml", ".json")

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
        """Read a file and apply the environment variables and the overrides.

        Raises:
            CommandError: the file does not exist.
            ConfigError: the file, a variable or an override is invalid.
        """
        from robo_orchard_lab.experiment.document import read_experiment

        if not os.path.lexists(file):
            raise CommandError(f"there is no file {file}", _nearest_file(file))
        return read_experiment(file, overrides=self.overrides, environ=os.environ)

    def load(self, file: Path, *, all_errors: bool = False) -> ExperimentConfig:
        """Read and validate a file; ``all_errors`` is as in `ExperimentConfig.from_document`.

        Raises:
            CommandError: the file does not exist.
            ConfigError: the experiment is invalid or not trusted.
        """
        return self.validated(self.read(file), all_errors=all_errors)

    def validated(
        self, document: ExperimentDocument, *, all_errors: bool = False
    ) -> ExperimentConfig:
        """Validate a document.

        Raises:
            ConfigError: the experiment is invalid or not trusted; each error has its location.
        """
        from robo_orchard_lab.experiment.config import ExperimentConfig

        try:
            return ExperimentConfig.from_document(document, self.trust, all_errors=all_errors)
        except ConfigError as error:
            for other in error.others:
                document.locate(other)
            raise

    @property
    def sets_run_folder(self) -> bool:
        """Return True if the command line or the environment sets ``run_folder``."""
        return any(override.path[0] == RUN_FOLDER for override in self._all_overrides())

    @property
    def sets_resume(self) -> bool:
        """Return True if the command line or the environment sets ``resume``."""
        return any(override.path == ("resume",) for override in self._all_overrides())

    def _all_overrides(self) -> list[Override]:
        from robo_orchard_lab.experiment.overrides import from_environment

        return [*self.overrides, *from_environment(os.environ, {})]

    def within(self, folder: Path, **fields: str) -> ExperimentArguments:
        """Return these arguments for the run in a folder, with further fields.

        Raises:
            CommandError: ``--run_folder`` is set, too.
        """
        from robo_orchard_lab.experiment.overrides import Origin, Override

        if any(override.path[0] == RUN_FOLDER for override in self.overrides):
            raise CommandError(
                f"the run is in {folder}, and --{RUN_FOLDER} names another folder",
                f"`{PROGRAM} train {folder / CONFIG_FILE} --{RUN_FOLDER} FOLDER` repeats it there",
            )
        origin = Origin("command line", str(folder))
        added = [
            Override((name,), value, None, origin)
            for name, value in {RUN_FOLDER: str(folder), **fields}.items()
        ]
        return replace(self, overrides=(*added, *self.overrides))


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
        """Parse field options; click parses the rest.

        Raises:
            click.UsageError: an option is unknown, or a field has no value.
            ConfigError: the path or the value of a field is invalid.
        """
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
                own.append(argument)
                if requires_value[argument]:
                    own += _next(waiting)
            elif not argument.startswith("--") or argument.partition("=")[0] in requires_value:
                own.append(argument)
            elif ctx.resilient_parsing:  # shell completion of a later argument
                if "=" not in argument:
                    _next(waiting)
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
    return [
        f"--allow={ALLOWED}" if arg == "--allow" and _is_not_a_value(following) else arg
        for arg, following in zip(args, [*args, ""][1:], strict=False)
    ]


def _is_not_a_value(argument: str) -> bool:
    path = Path(argument)
    return argument[:1] in ("", "-") or path.suffix in _SUFFIXES or path.exists()


def _next(waiting: Iterator[str]) -> list[str]:
    return [argument for argument in [next(waiting, None)] if argument is not None]


def _with_value(argument: str, waiting: Iterator[str], options: list[str]) -> str:
    """Return a field and its value as a single argument.

    Raises:
        click.UsageError: the field is unknown, or has no value.
    """
    name, has_value, _ = argument.partition("=")
    if name.removeprefix("--").partition(".")[0] not in _top_fields():
        raise click.UsageError(f"there is no option or field {name}; {_suggestion(name, options)}")
    if has_value:
        return argument
    value = next(waiting, None)
    if value is None or value.startswith("--"):
        raise click.UsageError(f"{name} requires a value, as in {name}=VALUE")
    return f"{argument}={value}"


def _top_fields() -> set[str]:
    return {field.path.partition(".")[0] for field in experiment_fields()}


def _suggestion(name: str, options: list[str]) -> str:
    word = name.removeprefix("--")
    known = [option.removeprefix("--") for option in options]
    near = difflib.get_close_matches(word, [*known, *(f.path for f in experiment_fields())], n=1)
    if not near and "." in word:  # a field of a configured class: only the first key is known
        first, _, rest = word.partition(".")
        near = [f"{top}.{rest}" for top in difflib.get_close_matches(first, _top_fields(), n=1)]
    return f"did you mean --{near[0]}?" if near else "see --help"


def _overrides(fields: list[str]) -> tuple[Override, ...]:
    if not fields:
        return ()
    from robo_orchard_lab.experiment.overrides import from_arguments

    found, _ = from_arguments(fields)
    return tuple(found)


def _nearest_file(file: Path) -> str:
    try:
        names = [each.name for each in file.parent.iterdir() if each.suffix in _SUFFIXES]
    except OSError:
        return ""
    near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
    return f"did you mean {file.with_name(near[0])}?" if near else ""
