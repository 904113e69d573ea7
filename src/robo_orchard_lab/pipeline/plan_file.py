"""plan.json in the run folder: the plan of the last start, and its changes at resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.logging import one_line
from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.plan import EFFECTS, RunPlan
from robo_orchard_lab.pipeline.run.durable import make_folder, remove_leftovers, replace_file
from robo_orchard_lab.pipeline.run.event_log import EventLog
from robo_orchard_lab.pipeline.run.run_state import read_bounded

logger = job_logger(__name__)

PLAN_FILE = "plan.json"
_MAX_RESUMES = 20
_MAX_DEPTH = 8
_MAX_LOGGED = 12
_LONGEST_TEXT = 300
_ABSENT = "not there"


@dataclass(frozen=True, slots=True)
class PlanChange:
    """Difference of one hook, or of the order on one channel, between two plans.

    Attributes:
        what: Name of the hook, or ``order on <channel>``.
        before: What only the earlier plan has; likewise ``after``.
    """

    what: str
    before: str
    after: str

    @classmethod
    def of(cls, *texts: str) -> PlanChange:
        """Return a change of bounded texts; an empty text stands for an absent hook."""
        return cls(*(text[:_LONGEST_TEXT] or _ABSENT for text in texts))

    def __str__(self) -> str:
        return one_line(f"{self.what}: {self.before} -> {self.after}")


def write_plan(folder: Path, plan: RunPlan, step: int, events: EventLog) -> None:
    """Write plan.json; log the changes since the last start of a run that continues.

    A plan that can't be written or compared is a warning.

    Args:
        folder: run folder.
        plan: plan of this start.
        step: completed steps; 0 for a new run.
        events: receives the changes as an event ``plan changed``.
    """
    document = plan.to_dict()
    resumes, changes = list[dict[str, Any]](), list[PlanChange]()
    if step:
        try:
            saved = _read(folder / PLAN_FILE)
            resumes = [each for each in _items(saved.get("resumes")) if isinstance(each, dict)]
            changes = compare_plans(_items(saved.get("hooks")), document["hooks"])
        except FileNotFoundError:
            pass  # the first start with this folder
        except (OSError, StateError, JsonError) as error:
            logger.warning("the hooks are not compared with those of the last start: %s", error)
    if changes:
        announce(logger, "the hooks differ from those of the last start:")
        for change in changes[:_MAX_LOGGED]:
            announce(logger, f"  {change}")
        if len(changes) > _MAX_LOGGED:
            announce(logger, f"  and {len(changes) - _MAX_LOGGED} more, see {PLAN_FILE}")
        events.add("plan changed", "; ".join(map(str, changes)))
        at = datetime.now(UTC).isoformat(timespec="seconds")
        resumes.append({"at": at, "step": step, "changes": [*map(asdict, changes)]})
    document["resumes"] = resumes[-_MAX_RESUMES:]
    try:
        make_folder(folder)
        remove_leftovers(folder / PLAN_FILE)
        replace_file(folder / PLAN_FILE, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        logger.warning("the plan of the run can't be written: %s", error)


def compare_plans(before: Iterable[Any], after: Iterable[Any]) -> list[PlanChange]:
    """Return the changes between the hooks of two plans, as plain data.

    Compared are classes, triggers, ``before`` and ``after``, order and declarations; source lines
    are not.

    >>> old = [{"channel": "on_step", "hook": "log", "when": "50 steps", "after": "log.py:3"}]
    >>> new = [{"channel": "on_step", "hook": "log", "when": "10 steps", "after": "log.py:9"}]
    >>> print(*compare_plans(old, new))
    log: on_step after, 50 steps -> on_step after, 10 steps
    """
    old, new = _Described.of(before), _Described.of(after)
    changes = []
    for name in {**old.hooks, **new.hooks}:
        sides = old.hooks.get(name, {}), new.hooks.get(name, {})
        keys = [key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key)]
        # The plan has the effects of a new hook; plans of an earlier version have none.
        if not all(sides) or sides[0].keys().isdisjoint(EFFECTS):
            keys = [key for key in keys if key not in EFFECTS]
        if keys:
            texts = ("; ".join(side[key] for key in keys if key in side) for side in sides)
            changes.append(PlanChange.of(name, *texts))
    for channel, names in old.order.items():
        common = [name for name in names if name in new.order.get(channel, ())]
        moved = [name for name in new.order.get(channel, ()) if name in names]
        if common != moved:
            while common[0] == moved[0]:
                del common[0], moved[0]
            while common[-1] == moved[-1]:
                del common[-1], moved[-1]
            order = ", ".join(common), ", ".join(moved)
            changes.append(PlanChange.of(f"order on {channel}", *order))
    return changes


@dataclass(frozen=True, slots=True)
class _Described:
    """Texts of each hook by class, channel and effect, and the names of hooks on each channel."""

    hooks: dict[str, dict[str, str]]
    order: dict[str, list[str]]

    @classmethod
    def of(cls, hooks: Iterable[Any]) -> _Described:
        found, order = dict[str, dict[str, str]](), dict[str, list[str]]()
        for hook in hooks:
            if not isinstance(hook, dict):
                continue
            name, channel = str(hook.get("hook")), str(hook.get("channel"))
            texts = found.setdefault(name, {"class": f"class {hook.get('class_name')}"})
            calls = " and ".join(role for role in ("before", "after") if hook.get(role))
            entry = f"{channel} {calls}, {hook.get('when')}"
            texts[channel] = f"{texts[channel]}; {entry}" if channel in texts else entry
            for effect in EFFECTS:
                if effect in hook:
                    names = hook[effect]
                    known = names if isinstance(names, list | tuple) else ["not declared"]
                    texts[effect] = f"{effect} {', '.join(map(str, known)) or 'nothing'}"
            if name not in (names_on := order.setdefault(channel, [])):
                names_on.append(name)
        return cls(found, order)


def _read(path: Path) -> dict[str, Any]:
    found = parse_json(read_bounded(path), max_depth=_MAX_DEPTH)
    if not isinstance(found, dict):
        raise StateError(f"{path} is no plan: expected a mapping, found {type(found).__name__}")
    return found


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
