"""Hooks of a run for its page: the plan, its changes at resumes, and measured costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robo_orchard_lab.report.files import Problems, items, mapping, read_object, text, whole
from robo_orchard_lab.report.series import number

_MAX_HOOKS = 2000
_MAX_NAMES = 50
_MAX_CHANGES = 200
_TEXTS = ("channel", "hook", "class_name", "when", "before", "after")
_EFFECTS = ("reads", "changes", "requests")
_PHASES = ("before", "after")


def read_plan(folder: Path, problems: Problems) -> dict[str, Any]:
    """Read plan.json, and profile.json of a ``HookProfiler`` if there is one.

    Returns:
        ``plan``: hooks, the outermost of each channel first, each with its ``cost`` or None;
        ``plan_changes``: differences at resumes; ``profile``: times of a step, or None.
    """
    document = read_object(folder / "plan.json", problems)
    profile = read_object(folder / "profile.json", problems)
    costs = _costs(profile)
    plan = []
    for hook in map(mapping, items(document.get("hooks"))[:_MAX_HOOKS]):
        found: dict[str, Any] = {name: text(hook.get(name), limit=500) for name in _TEXTS}
        found |= {effect: _names(hook.get(effect)) for effect in _EFFECTS}
        place = found["channel"], found["hook"]
        parts = [costs[*place, p].pop(0) for p in _PHASES if found[p] and costs[*place, p]]
        found["cost"] = _total(parts)
        plan.append(found)
    return {"plan": plan, "plan_changes": _changes(document), "profile": _stages(profile)}


def _names(value: Any) -> list[str] | None:
    """Return declared names; None if not declared."""
    names = value[:_MAX_NAMES] if isinstance(value, list) else None
    return None if names is None else [text(name, limit=200) for name in names]


def _changes(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of hooks at resumes, each with the step of the resume."""
    found = []
    for resume in map(mapping, items(document.get("resumes"))):
        for change in map(mapping, items(resume.get("changes"))):
            texts = {name: text(change.get(name), limit=500) for name in ("what", *_PHASES)}
            found.append({"step": whole(resume.get("step")), **texts})
    return found[-_MAX_CHANGES:]


def _costs(profile: Mapping[str, Any]) -> defaultdict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the times of functions by channel, hook and phase, the outermost first."""
    found = defaultdict[tuple[str, str, str], list[dict[str, Any]]](list)
    hooks = [mapping(hook) for hook in items(profile.get("hooks"))[: 2 * _MAX_HOOKS]]
    for hook in sorted(hooks, key=lambda hook: whole(hook.get("position")) or 0):
        names = (hook.get(key) for key in ("channel", "hook", "phase"))
        channel, name, phase = (text(each, limit=500) for each in names)
        found[channel, name, phase].append(hook)
    return found


def _total(parts: list[dict[str, Any]]) -> dict[str, float | None] | None:
    """Return calls, first call, own time of the others, and share of before and after together."""
    if not parts:
        return None
    sums = {
        name: sum(_seconds(part.get(name)) or 0.0 for part in parts)
        for name in ("first_s", "self_s", "share")
    }
    return {"calls": sum(whole(part.get("calls")) or 0 for part in parts), **sums}


def _stages(profile: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the median step, and mean time and share of each stage."""
    steps = whole(profile.get("steps"))
    if not steps or steps < 0:
        return None
    stages = [
        {
            "name": text(name, limit=80),
            "step_s": _seconds(mapping(stage).get("step_s")),
            "share": _seconds(mapping(stage).get("share")),
        }
        for name, stage in [*mapping(profile.get("stages")).items()][:_MAX_NAMES]
    ]
    return {
        "steps": steps,
        "step_s": _seconds(profile.get("step_seconds")),
        "first_step_s": _seconds(profile.get("first_step_s")),
        "device_idle_s": _seconds(mapping(profile.get("device_idle")).get("mean_s")),
        "stages": [stage for stage in stages if stage["step_s"] is not None],
        "ranks": len(items(profile.get("ranks"))) or 1,
    }


def _seconds(value: Any) -> float | None:
    """Return a finite number >= 0, or None."""
    found = number(float(value)) if type(value) in (int, float) and abs(value) < 1e15 else None
    return found if found is not None and found >= 0 else None
