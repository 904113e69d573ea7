"""Commands of the program, and their click classes."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import click

from robo_orchard_core.utils.config.errors import suggest_name

Sections = Mapping[str, Mapping[str, tuple[str, str]]]
"""Headings of help; for each, commands by name: a help line and ``"module:attribute"``."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _debug_option() -> click.Option:
    # `main` looks for the flag itself: an error may precede parsing.
    text = "Show the traceback of an error."
    return click.Option(["--debug"], is_flag=True, expose_value=False, help=text)


class Command(click.Command):
    """Command with ``--debug`` and ``-h``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**SETTINGS, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


@click.pass_context
def _help_without_command(ctx: click.Context) -> None:
    """Print help to standard error and exit with 2 if the arguments name no command."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


class CommandGroup(click.Group):
    """Group of commands in the order of definition, with suggestions for a wrong name."""

    command_class = Command

    def __init__(self, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(
            name,
            invoke_without_command=True,
            subcommand_metavar="COMMAND ...",
            context_settings=dict(SETTINGS),
            **{**kwargs, "callback": _help_without_command},
        )
        self.params.append(_debug_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of definition."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command at the start of the arguments; an unknown one gets a suggestion."""
        names = self.list_commands(ctx)
        if args[0] not in names:
            advice = suggest_name(args[0], names, "expected")
            raise click.UsageError(f"there is no command {args[0]!r}; {advice}", ctx)
        return super().resolve_command(ctx, args)


class LazyGroup(CommandGroup):
    """Group with commands in modules that are imported on use; ``sections`` lists them."""

    def __init__(self, name: str, sections: Sections, help: str) -> None:  # noqa: A002 - click's name
        super().__init__(name, help=help)
        self._sections = sections
        self._references = {
            command: reference
            for section in sections.values()
            for command, (_, reference) in section.items()
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return list(self._references)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None for an unknown name."""
        if cmd_name not in self._references:
            return None
        command: click.Command = resolve_name(self._references[cmd_name])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without their modules."""
        for heading, section in self._sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, line) for name, (line, _) in section.items()])
