"""``hooks plan``: which hooks run for a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.document import ExperimentDocument
    from robo_orchard_lab.experiment.inspection import PlannedHook

_BY_TRAINER = "the trainer"


@click.command("plan", cls=ExperimentCommand)
@file_argument
@json_option
def command(file: Path, as_json: bool, experiment: ExperimentArguments) -> None:
    """Show which hooks run for FILE: on which channel, in which order, when, from which line.

    The first of a channel is the outermost: its before is called first, and its after last. The
    hooks are built; models and data are not.
    """
    from robo_orchard_lab.experiment.inspection import build_hook_set, plan_hooks

    document = experiment.read(file)
    hooks = plan_hooks(build_hook_set(experiment.validated(document)))
    if as_json:
        print_json([{**asdict(hook), "said_in": _said_in(hook, document)} for hook in hooks])
    else:
        headings = ["channel", "hook", "class", "when", "calls", "said in", "code"]
        print_table(headings, _rows(hooks, document))


def _rows(hooks: Iterable[PlannedHook], document: ExperimentDocument) -> Iterable[list[str]]:
    last = ""
    for hook in hooks:
        calls = [name for name in ("before", "after") if getattr(hook, name) is not None]
        yield [
            "" if hook.channel == last else hook.channel,
            hook.hook,
            hook.class_name,
            hook.when,
            ", ".join(calls),
            _said_in(hook, document),
            _places(hook),
        ]
        last = hook.channel


def _places(hook: PlannedHook) -> str:
    """The lines of its functions; the file once, where they are in one."""
    before, after = hook.before or "", hook.after or ""
    file, _, line = after.rpartition(":")
    if before and file and before.startswith(f"{file}:"):
        return f"{before}, {line}"
    return ", ".join(filter(None, (before, after)))


def _said_in(hook: PlannedHook, document: ExperimentDocument) -> str:
    """Where the experiment says that there is this hook."""
    from robo_orchard_lab.experiment.overrides import DEFAULT
    from robo_orchard_lab.experiment.parts import CHECKPOINT

    named = document.document.get("hooks")
    if hook.hook == CHECKPOINT:
        return str(document.origins.get((CHECKPOINT,), DEFAULT))
    if isinstance(named, dict) and hook.hook in named:
        return str(document.origins["hooks", hook.hook])
    return _BY_TRAINER
