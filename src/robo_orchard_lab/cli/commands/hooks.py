"""Commands ``hooks list``, ``hooks show`` and ``hooks plan``."""

from __future__ import annotations

import re
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from robo_orchard_lab.cli.commands import CommandGroup
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
    trust_option,
)
from robo_orchard_lab.cli.output import (
    json_option,
    print_json,
    print_rich,
    print_table,
    readable_yaml,
    say,
    styled,
)

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.document import ExperimentDocument
    from robo_orchard_lab.pipeline.plan import PlannedHook


@click.group("hooks", cls=CommandGroup)
def hooks() -> None:
    """List and show hooks, and the hooks that run for a file."""


@hooks.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the built-in hooks with a description.

    \b
      robo-orchard-lab hooks list
      robo-orchard-lab hooks list --json
    """
    from robo_orchard_lab.experiment.inspection import hook as describe
    from robo_orchard_lab.experiment.inspection import hook_summaries

    found = hook_summaries()
    if not as_json:
        print_table(["hook", "does"], found.items())
        return
    print_json(
        [
            {
                "name": hook.name,
                "class": hook.reference,
                "summary": hook.summary,
                "channels": hook.channels,
                "fields": [field.path for field in hook.fields],
            }
            for hook in map(describe, found)  # imports the hooks
        ]
    )


@hooks.command("show")
@click.argument("name", shell_complete=lambda context, parameter, text: _complete(text))
@trust_option
@json_option
def show(name: str, trust: tuple[str, ...], as_json: bool) -> None:
    """Show the fields of a hook, and an entry for a file.

    \b
      robo-orchard-lab hooks show KeepBest
      robo-orchard-lab hooks show my_package.hooks:MyHook --trust my_package

    NAME is a built-in hook (see `robo-orchard-lab hooks list`) or a class of a trusted package.
    """
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.inspection import hook as describe

    trusted = ExperimentTrust.of(trust)
    trusted.make_local_modules_importable()
    hook = describe(name, trusted.trust)
    if as_json:
        print_json({"class": hook.reference, **asdict(hook)})
        return
    say(styled(hook.name, "bold") + f"  {hook.reference}")
    say(hook.summary)
    if hook.description:
        say(f"\n{hook.description}")
    if hook.channels is not None:
        say(f"\nRuns on {', '.join(hook.channels)}.")
    for effect in hook.effects:
        say(f"{effect[0].upper()}{effect[1:]}.")
    if hook.fields:
        say()
        rows = [
            (
                each.path,
                each.type,
                "required" if each.default is None else each.default,
                each.description,
            )
            for each in hook.fields
        ]
        print_table(["field", "type", "default", "is"], rows)
    say()
    say(styled("In a file:", "bold"))
    entry = readable_yaml({"hooks": {_entry_name(hook.name): hook.example}})
    say(textwrap.indent(entry, "  ").rstrip())


def _complete(text: str) -> list[CompletionItem]:
    from robo_orchard_lab.experiment.inspection import hook_names

    return [CompletionItem(name) for name in hook_names() if name.startswith(text)]


def _entry_name(name: str) -> str:
    """Return a key for a hook in a file.

    >>> _entry_name("ProgressBarHook"), _entry_name("EMA")
    ('progress_bar', 'ema')
    """
    short = name.rpartition(":")[2].removesuffix("Hook")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", short).lower()


@hooks.command("plan", cls=ExperimentCommand)
@file_argument
@json_option
@click.option("--mermaid", is_flag=True, help="Print a flowchart for Mermaid (mermaid.js.org).")
def plan(file: Path, as_json: bool, mermaid: bool, experiment: ExperimentArguments) -> None:
    """Show the hooks that run for FILE: channel, order, trigger, source line and effects.

    \b
      robo-orchard-lab hooks plan experiment.yaml
      robo-orchard-lab hooks plan experiment.yaml --hooks.stats=null --mermaid

    The first hook of a channel is the outermost: its before runs first, its after runs last. Where
    a hook appears first, the plan shows what the hook reads, changes and requests. The hooks are
    built; models and data are not.
    """
    from robo_orchard_lab.experiment.inspection import build_hook_set
    from robo_orchard_lab.pipeline.plan import RunPlan

    if as_json and mermaid:
        raise click.UsageError("expected one of --json and --mermaid, found both; omit one")
    document = experiment.read(file)
    found = RunPlan.of(build_hook_set(experiment.validated(document)))
    found = RunPlan(tuple(replace(h, defined_in=_origin(h, document)) for h in found.hooks))
    if as_json:
        print_json(found.to_dict()["hooks"])
    elif mermaid:
        say(found.to_mermaid())
    else:
        print_rich(found)


def _origin(hook: PlannedHook, document: ExperimentDocument) -> str:
    """Return the origin of a hook in the experiment."""
    from robo_orchard_lab.experiment.overrides import DEFAULT
    from robo_orchard_lab.experiment.parts import CHECKPOINT

    if hook.hook == CHECKPOINT:
        return str(document.origins.get((CHECKPOINT,), DEFAULT))
    return str(document.origins.get(("hooks", hook.hook), "the trainer"))
