"""Plan of a run: its hooks by channel, with trigger and source lines; plan.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.hook import FunctionInfo
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.pipeline.run.durable import make_folder, remove_leftovers, replace_file

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class PlannedHook:
    """Hook on a channel of a run.

    Attributes:
        position: Position from 0, the outermost: its ``before`` runs first, its ``after`` last.
        hook: Name in the experiment of the hooks to which it belongs.
        when: ``always``, or the trigger.
        before: File and line of ``before``, or None; likewise ``after``.
    """

    channel: str
    position: int
    hook: str
    class_name: str
    when: str
    before: str | None
    after: str | None


def plan_hooks(hooks: PipelineHooks) -> list[PlannedHook]:
    """List the hooks of a run by channel, each channel from the outermost hook."""

    def location(function: Any) -> str | None:
        if function is None:
            return None
        info = FunctionInfo.of(function)
        return info.location or info.name

    return [
        PlannedHook(
            channel=channel,
            position=entry.position,
            hook=entry.label if entry.owner is None else entry.owner.name,
            class_name=type(entry.owner or entry.context).__name__,
            when=str(getattr(entry.context, "when", "always")),
            before=location(entry.before),
            after=location(entry.after),
        )
        for channel in CHANNEL_NAMES
        for entry in hooks.get_channel(channel).entries()
    ]


def write_plan(folder: Path, hooks: PipelineHooks) -> None:
    """Write plan.json in a run folder; raises OSError."""
    document = {"version": 1, "hooks": [asdict(hook) for hook in plan_hooks(hooks)]}
    make_folder(folder)
    remove_leftovers(folder / PLAN_FILE)
    replace_file(folder / PLAN_FILE, json.dumps(document, indent=1).encode() + b"\n")
