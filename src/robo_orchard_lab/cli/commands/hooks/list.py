"""``hooks list``: the built-in hooks."""

from __future__ import annotations

import click

from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import json_option, print_json, print_table


@click.command("list", cls=Command)
@json_option
def command(as_json: bool) -> None:
    """List the built-in hooks, and what each does."""
    from robo_orchard_lab.experiment.inspection import hooks

    found = hooks()
    if as_json:
        print_json(
            [
                {
                    "name": hook.name,
                    "class": hook.reference,
                    "summary": hook.summary,
                    "channels": hook.channels,
                    "fields": [field.path for field in hook.fields],
                }
                for hook in found
            ]
        )
        return
    print_table(["hook", "does"], [(hook.name, hook.summary) for hook in found])
