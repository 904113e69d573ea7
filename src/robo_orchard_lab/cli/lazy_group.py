"""Commands, and groups of them that import a command's module when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from robo_orchard_core.utils.config.errors import suggest_name

Listed = Mapping[str, Mapping[str, tuple[str, str]]]
"""Headings, beneath each the commands by name: a line about it, and the module that has it."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _debug_option() -> click.Option:
    # Looked for in what was typed, by whoever tells of errors: they come ahead of parsing, too.
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command, with the options that all of them have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**SETTINGS, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class LazyGroup(click.Group):
    """A group of commands, in sections, none of which is imported before it is asked for.

    Args:
        name: of the group.
        listed: its commands.
        help: what it is about.
    """

    def __init__(self, name: str, listed: Listed, help: str) -> None:  # noqa: A002 - click's word
        super().__init__(
            name,
            help=help,
            invoke_without_command=True,
            subcommand_metavar="COMMAND ...",
            context_settings=dict(SETTINGS),
        )
        self.params.append(_debug_option())
        self._listed = listed
        self._modules = {
            command: module
            for section in listed.values()
            for command, (_, module) in section.items()
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in their order."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, whose module is imported now."""
        if cmd_name not in self._modules:
            return None
        command: click.Command = import_module(self._modules[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with.

        Raises:
            click.UsageError: there is no such command; with the nearest that there is.
        """
        if args[0] not in self._modules:
            advice = suggest_name(args[0], [*self._modules], "there are")
            raise click.UsageError(f"there is no command {args[0]!r}; {advice}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """What the command returns; without one, help, which is a wrong use."""
        named = vars(ctx).get("_protected_args", vars(ctx).get("protected_args"))  # by click's age
        if not (named or ctx.args):
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in help, out of what is known without the commands."""
        for heading, section in self._listed.items():
            with formatter.section(heading):
                formatter.write_dl([(name, about) for name, (about, _) in section.items()])
