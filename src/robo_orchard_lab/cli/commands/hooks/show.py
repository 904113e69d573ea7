"""``hooks show``: one hook, with its fields."""

from __future__ import annotations

import re
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from robo_orchard_lab.cli.experiment_arguments import trust_option
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import (
    json_option,
    print_json,
    print_table,
    readable_yaml,
    say,
    styled,
)

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.inspection import HookInfo


def _names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from robo_orchard_lab.experiment.inspection import hook_names

    return [CompletionItem(name) for name in hook_names() if name.startswith(incomplete)]


@click.command("show", cls=Command)
@click.argument("name", shell_complete=_names)
@trust_option
@json_option
def command(name: str, trust: tuple[str, ...], as_json: bool) -> None:
    """Show what the hook NAME does, its fields, and what to write in a file.

    NAME is that of a built-in one (`robo-orchard-lab hooks list`), or where another one is defined,
    as my_package.hooks:MyHook, of a package that is trusted.
    """
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.inspection import hook

    trusted = ExperimentTrust.of(trust)
    trusted.make_local_modules_importable()
    found = hook(name, trusted.trust)
    if as_json:
        print_json({"class": found.reference, **asdict(found)})
    else:
        _print(found)


def _print(hook: HookInfo) -> None:
    say(styled(hook.name, "bold") + f"  {hook.reference}")
    say(hook.summary)
    if hook.description:
        say()
        say(hook.description)
    if hook.channels is not None:
        say()
        say(f"Runs on {', '.join(hook.channels)}.")
    if hook.fields:
        say()
        rows = [
            (
                field.path,
                field.type,
                "required" if field.default is None else field.default,
                field.description,
            )
            for field in hook.fields
        ]
        print_table(["field", "type", "default", "is"], rows)
    say()
    say(styled("In a file:", "bold"))
    entry = readable_yaml({"hooks": {_entry_name(hook.name): hook.example}})
    say(textwrap.indent(entry, "  ").rstrip())


def _entry_name(name: str) -> str:
    """A name for it among the hooks of a file.

    >>> _entry_name("ProgressBarHook"), _entry_name("EMA")
    ('progress_bar', 'ema')
    """
    short = name.rpartition(":")[2].removesuffix("Hook")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", short).lower()
