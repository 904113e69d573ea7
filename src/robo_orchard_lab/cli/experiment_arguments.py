"""What commands take that are about an experiment: ``--trust``, and any of its fields as an option.

Fields go over what the file says, by their dotted paths, before anything is validated; so they
reach named hooks, and the fields of whatever class is configured there::

    robo-orchard-lab train digits.yaml --trainer.max_epoch 3 --hooks.log.every "50 steps"
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.experiment.inspection import experiment_fields

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.document import ExperimentDocument
    from robo_orchard_lab.experiment.overrides import Override

file_argument = click.argument("file", type=click.Path(path_type=Path))
"""FILE, whose errors are told by whoever reads it."""

_TRUST: dict[str, Any] = {
    "multiple": True,
    "metavar": "PACKAGE",
    "help": "A package, or module:Class, whose code a file may name; as often as needed. Others "
    "are never imported. [tool.robo_orchard_lab] trust in pyproject.toml does it for a project.",
}
trust_option = click.option("--trust", **_TRUST)
"""``--trust``, of commands that take no overrides."""

ALLOWED = "trajectory"
"""What ``--allow`` allows: the worst that may be."""

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")


@dataclass(frozen=True)
class ExperimentArguments:
    """What was typed about an experiment, beside its file."""

    trust: tuple[str, ...] = ()
    """Of ``--trust``; what the user's own pyproject.toml trusts comes to it."""
    overrides: tuple[Override, ...] = ()

    def read(self, file: Path) -> ExperimentDocument:
        """The document of a file, with the overrides and the environment's over it.

        Raises:
            CommandError: there is no such file.
            ConfigError: it, or what was typed, is no experiment.
        """
        from robo_orchard_lab.experiment.document import read_experiment

        if not os.path.lexists(file):
            raise CommandError(f"there is no file {file}", _nearest_file(file))
        return read_experiment(file, overrides=self.overrides, environ=os.environ)

    def load(self, file: Path) -> ExperimentConfig:
        """The experiment of a file, validated.

        Raises:
            CommandError: there is no such file.
            ConfigError: it, or what was typed, is no experiment, or is not trusted.
        """
        return self.validated(self.read(file))

    def validated(self, document: ExperimentDocument) -> ExperimentConfig:
        """The experiment of a document.

        Raises:
            ConfigError: it is none, or is not trusted.
        """
        from robo_orchard_lab.experiment.config import ExperimentConfig

        try:
            return ExperimentConfig.from_document(document, self.trust)
        except ConfigError as error:
            for other in error.others:
                document.locate(other)
            raise


class ExperimentCommand(Command):
    """A command whose function gets ``experiment``, what was typed about one.

    Args:
        lists_fields: whether its help lists the fields.
    """

    def __init__(self, *args: Any, lists_fields: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lists_fields = lists_fields
        self.options_metavar = "[OPTIONS] [--FIELD VALUE ...]"
        self.params.insert(-1, click.Option(["--trust"], **_TRUST))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the fields out, and leave the rest to click."""
        own, fields = self._divided(ctx, args)
        rest = super().parse_args(ctx, own)
        trust = ctx.params.pop("trust")
        if not ctx.resilient_parsing:
            ctx.params["experiment"] = ExperimentArguments(trust, _overrides(fields))
        return rest

    def _divided(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        """What is the command's own, and what are fields, each as ``--path=value``."""
        takes_value = {
            name: not (option.is_flag or option.count)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option)
            for name in (*option.opts, *option.secondary_opts)
        }
        own: list[str] = []
        fields: list[str] = []
        waiting = iter(_complete(args))
        for argument in waiting:
            if argument == "--":
                own += [argument, *waiting]
            elif argument in takes_value:
                own.append(argument)
                if takes_value[argument]:
                    own += _next(waiting)
            elif not argument.startswith("--") or argument.partition("=")[0] in takes_value:
                own.append(argument)
            elif ctx.resilient_parsing:  # to complete what comes behind
                if "=" not in argument:
                    _next(waiting)
            else:
                fields.append(_with_value(argument, waiting, [*takes_value]))
        return own, fields

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Options, fields, and what the parameters say."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            found += [
                CompletionItem(f"--{field.path}", help=field.description)
                for field in experiment_fields()
                if f"--{field.path}".startswith(incomplete)
            ]
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and the fields where they are listed."""
        super().format_options(ctx, formatter)
        if not self._lists_fields:
            with formatter.section("Fields"):
                formatter.write_text(
                    "Any field of the experiment, as in --trainer.max_epoch 3 or --hooks.bar=null; "
                    "`robo-orchard-lab train --help` lists them."
                )
            return
        with formatter.section("Fields (--FIELD VALUE, which goes over what the file says)"):
            formatter.write_dl([(f"--{field.path}", field.text) for field in experiment_fields()])
        with formatter.section("More about fields"):
            formatter.write_text(
                "A part has the parameters of its class as fields: --optimizer.lr 0.1, "
                "--hooks.NAME.every '50 steps'; `robo-orchard-lab hooks show` tells a hook's. "
                "null removes a hook or an evaluation set. A value that begins with two dashes is "
                "given behind an equals sign. Environment variables go between the file and what "
                "is typed: ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH=3."
            )


def _complete(args: list[str]) -> list[str]:
    """The arguments with its one value behind an ``--allow`` that stands alone, for which click
    would take the file or the field that follows."""
    return [
        f"--allow={ALLOWED}" if arg == "--allow" and _is_no_value(after) else arg
        for arg, after in zip(args, [*args, ""][1:], strict=False)
    ]


def _is_no_value(argument: str) -> bool:
    path = Path(argument)
    return argument[:1] in ("", "-") or path.suffix in _SUFFIXES or path.exists()


def _next(waiting: Iterator[str]) -> list[str]:
    return [argument for argument in [next(waiting, None)] if argument is not None]


def _with_value(argument: str, waiting: Iterator[str], options: list[str]) -> str:
    """The field and its value in one.

    Raises:
        click.UsageError: it is no field, or has no value.
    """
    name, has_value, _ = argument.partition("=")
    if name.removeprefix("--").partition(".")[0] not in _top_fields():
        raise click.UsageError(f"there is no option or field {name}; {_nearest(name, options)}")
    if has_value:
        return argument
    value = next(waiting, None)
    if value is None or value.startswith("--"):
        raise click.UsageError(f"{name} needs a value, as in {name}=VALUE")
    return f"{argument}={value}"


def _top_fields() -> set[str]:
    return {field.path.partition(".")[0] for field in experiment_fields()}


def _nearest(name: str, options: list[str]) -> str:
    word = name.removeprefix("--")
    known = [option.removeprefix("--") for option in options]
    near = difflib.get_close_matches(word, [*known, *(f.path for f in experiment_fields())], n=1)
    if not near and "." in word:  # the field of a part, whose name alone is known
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
