"""Story of a run from its folder: everything that a page shows, as JSON-compatible values."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.config.errors import ConfigError, dotted
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.overrides import leaves
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, RUN_STATE, STARTS
from robo_orchard_lab.report.files import (
    Problems,
    inside,
    items,
    mapping,
    open_regular,
    read_lines,
    read_object,
    reason_of,
    text,
    utc_time,
    whole,
)
from robo_orchard_lab.report.media import read_media
from robo_orchard_lab.report.plan import read_plan
from robo_orchard_lab.report.series import (
    MAX_POINTS,
    Metrics,
    Mode,
    guess_mode,
    number,
    read_metrics,
    to_plain,
)

_TRACE = "trace.json"
ENVIRONMENT = "environment.json"  # of a script; by the hook Report
_MAX_STARTS = 100
_MAX_CHECKPOINTS = 200
_MAX_EVENTS_OF_A_KIND = 300
_MAX_EVALUATIONS = 200
_MAX_VALUES = 5000
_STEP = re.compile(r"step_([0-9]{8,16})")
_START = re.compile(r"[0-9]{4,9}\.json")
_SECONDS_PER_RUN = 3600 * 24 * 366 * 10


@dataclass(frozen=True, slots=True)
class Configuration:
    """Recorded configuration of a run: values by dotted path, and the unflattened document."""

    document: Mapping[str, Any]
    values: dict[str, Any]

    def modes(self) -> dict[str, Mode]:
        """Return the declared direction of each monitored metric."""
        hooks = mapping(self.document.get("hooks"))
        found: dict[str, Mode] = {}
        for part in (*hooks.values(), self.document.get("checkpoint")):
            monitor, mode = mapping(part).get("monitor"), mapping(part).get("mode")
            if isinstance(monitor, str) and mode in ("min", "max"):
                found[monitor] = mode
        return found

    def metrics_file(self, folder: Path) -> Path:
        """Return the metrics file of the run: the path of its JsonLinesSink, or metrics.jsonl."""
        for hook in mapping(self.document.get("hooks")).values():
            sinks = mapping(hook).get("sinks")
            for sink in [*mapping(sinks).values(), *items(sinks)]:
                name, path = text(mapping(sink).get("class_type")), mapping(sink).get("path")
                if name.endswith("JsonLinesSink") and isinstance(path, str):
                    return inside(folder, path) or folder / "metrics.jsonl"
        return folder / "metrics.jsonl"


def read_story(folder: Path, points: int = MAX_POINTS) -> dict[str, Any]:
    """Read a run folder; what is missing or damaged is listed under ``problems``.

    Args:
        folder: run folder.
        points: about the number of points of all curves.
    """
    problems = Problems()
    state = read_object(folder / RUN_STATE, problems)
    config = read_configuration(folder, problems)
    metrics_file = config.metrics_file(folder)
    metrics = read_metrics(metrics_file, problems)
    if not metrics.curves:
        problems.add(
            f"there are no metrics: {metrics_file.name} is missing or empty; a MetricsLogger with "
            "a JsonLinesSink writes the file at the first logging point"
        )
    starts = _starts(folder, problems)
    checkpoints = _checkpoints(folder, config, state, problems)
    if not state:
        problems.add(f"there is no {RUN_STATE}: no run was started in this folder, or it was lost")
    events = _events(folder, checkpoints, starts, problems)
    verdict = read_verdict(folder, state)
    if metrics.last_step is not None and metrics.last_step > (verdict["steps"] or 0):
        verdict["steps"], verdict["epochs"] = metrics.last_step, metrics.last_epoch
    environment = _environment(starts, read_object(folder / ENVIRONMENT, problems), checkpoints)
    for checkpoint in checkpoints:
        del checkpoint["metadata"]
    return {
        "name": text(config.document.get("name")) or folder.resolve().name,
        "folder": text(os.fspath(folder.resolve())),
        "is_experiment": bool(config.document),
        "verdict": verdict,
        "seconds": run_seconds(state, events),
        "evaluations": _evaluations(metrics, config.modes()),
        "series": to_plain(metrics, points),
        "checkpoints": checkpoints,
        "events": events[-3000:],
        "configuration": _configuration(config, starts, environment),
        "base": _base(starts),
        "changes": [
            {"start": name, **_change(change)}
            for name, start in starts
            for change in items(start.get("changes"))[:200]
        ],
        "environment": environment,
        **read_plan(folder, problems),
        "trace": _trace(folder),
        "media": read_media(folder, problems),
        "problems": [*problems],
    }


# --- verdict ---------------------------------------------------------------------------------


def read_verdict(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outcome of a run from its run_state.json: state, reason and place.

    If the process is gone and the file says running, as after a full disk, the last event decides.
    States: completed, stopped, preempted, failed, running, unknown.
    """
    progress = mapping(state.get("progress"))
    found = text(state.get("state"), "unknown", 40)
    error = mapping(state.get("error"))
    reason, by = text(state.get("reason")), text(state.get("by"))
    if found == "running":
        with suppress(ValueError, TypeError):
            process = ProcessIdentity.model_validate(state.get("process"))
            if process.is_gone():
                found = "failed"
                error = {"type": "Killed", "message": process.describe_death(), "rank": 0}
                last = read_events(folder, Problems())[-1:]
                if last and last[0]["event"] == "end":
                    found, _, reason = last[0]["text"].partition(": ")
                    error = {}
    if found == "completed" and reason:
        found = "stopped"
    if found not in ("completed", "stopped", "preempted", "failed", "running"):
        found = "unknown"
    return {
        "state": found,
        "reason": reason,
        "by": by,
        "error": {
            name: text(error.get(name)) for name in ("type", "message", "rank", "hook", "location")
        }
        if error
        else None,
        "exit_code": whole(state.get("exit_code")),
        "steps": whole(progress.get("global_step_id")),
        "epochs": whole(progress.get("epoch_id")),
        "updates": whole(progress.get("optimizer_step_id")),
        "skipped_updates": whole(progress.get("skipped_optimizer_steps")),
        "world_size": whole(state.get("processes")),
        "started_at": utc_time(state.get("started_at")),
        "updated_at": utc_time(state.get("updated_at")),
        "rollbacks": len(items(state.get("rollbacks"))),
    }


def run_seconds(
    state: Mapping[str, Any], events: list[dict[str, Any]], last_at: str | None = None
) -> float | None:
    """Return the time that the processes of a run spent, in seconds, or None.

    Args:
        state: run_state.json.
        events: events of the run.
        last_at: last sign of life, which may be later than the last event.
    """
    total, began, last = 0.0, None, None
    for event in events:
        if event["at"] is None:
            continue
        at = datetime.fromisoformat(event["at"])
        if event["event"] in ("start", "resume"):
            if began is not None and last is not None:
                total += max(0.0, (last - began).total_seconds())
            began = at
        last = at
    if began is None:
        began = last = None
        with suppress(ValueError, TypeError):
            began = datetime.fromisoformat(utc_time(state.get("started_at")) or "")
            last = datetime.fromisoformat(utc_time(state.get("updated_at")) or last_at or "")
    if began is not None and last is not None:
        last = max(last, datetime.fromisoformat(last_at)) if last_at else last
        total += max(0.0, (last - began).total_seconds())
        return total if total < _SECONDS_PER_RUN else None
    return None


# --- configuration, starts and environment ---------------------------------------------------


def read_configuration(folder: Path, problems: Problems) -> Configuration:
    """Read the recorded configuration of a run; empty if missing or damaged."""
    file = folder / CONFIG_FILE
    if not os.path.lexists(file):
        return Configuration({}, {})
    try:
        document = read_experiment(file).document
    except ConfigError as error:
        problems.add(f"{CONFIG_FILE} can't be read: {text(str(error), limit=300)}")
        return Configuration({}, {})
    return Configuration(document, {dotted(path): value for path, value in leaves(document)})


def _starts(folder: Path, problems: Problems) -> list[tuple[str, dict[str, Any]]]:
    """Read the records of starts, the oldest first."""
    names = _names(folder, STARTS, _START, problems)[-_MAX_STARTS:]
    return [(name[:-5], read_object(folder / STARTS / name, problems)) for name in names]


def _names(folder: Path, inner: str, form: re.Pattern[str], problems: Problems) -> list[str]:
    """List the names of a form in a folder of the run, in order; no link out of it is followed."""
    if inside(folder, f"{inner}/_") is None:
        problems.add(f"{inner} is a link out of the run folder, and is not read")
        return []
    try:
        return sorted(name for name in os.listdir(folder / inner) if form.fullmatch(name))
    except OSError:
        return []


def newest_commit(folder: Path, problems: Problems) -> tuple[str, bool] | None:
    """Return the commit of the newest start, and True if files were changed."""
    for _, start in reversed(_starts(folder, problems)):
        git = mapping(start.get("git"))
        if git.get("commit"):
            return text(git["commit"], limit=64), _has_changes(git)
    return None


def _has_changes(git: Mapping[str, Any]) -> bool:
    """Return True if tracked files differ from the commit, or may differ."""
    changed = git.get("changed")
    names = [name for name in items(changed) if not text(name).startswith("??")]
    return changed is True or bool(names or git.get("left_out"))


def _environment(
    starts: list[tuple[str, dict[str, Any]]],
    script: dict[str, Any],
    checkpoints: list[dict[str, Any]],
) -> dict[str, Any]:
    """Describe command, host, versions and git state of the newest start or checkpoint."""
    metadata = script or (mapping(checkpoints[-1]["metadata"]) if checkpoints else {})
    found = starts[-1][1] if starts and starts[-1][1] else metadata
    git = mapping(found.get("git"))
    return {
        "command": text(found.get("command")),
        "folder": text(found.get("folder")),
        "host": text(found.get("host")),
        "versions": {
            text(k, limit=80): text(v, limit=80)
            for k, v in [*mapping(found.get("versions")).items()][:60]
        },
        "commit": text(git.get("commit"), limit=64),
        "branch": text(git.get("branch"), limit=200),
        "changed": [text(name, limit=300) for name in items(git.get("changed"))[:50]],
        "has_changes": _has_changes(git),
        "starts": [
            {
                "name": name,
                "at": utc_time(start.get("started_at")),
                "host": text(start.get("host")),
                "command": text(start.get("command"), limit=500),
            }
            for name, start in starts
        ],
        "configuration": mapping(metadata.get("configuration")),
    }


def _configuration(
    config: Configuration,
    starts: list[tuple[str, dict[str, Any]]],
    environment: dict[str, Any],
) -> list[dict[str, str]]:
    """List values with their sources; for a script, the configuration that its run recorded."""
    values = config.values
    described = environment.pop("configuration")
    if not values and described:
        values = {dotted(path): value for path, value in leaves(described)}
    sources: dict[str, str] = {}
    for number_, (_, start) in enumerate(starts):
        for path, source in mapping(start.get("sources")).items():
            # A resume reads the run's own file, which says nothing about the origin.
            name = Path(text(source).rpartition(":")[0]).name
            if not number_ or name != CONFIG_FILE:
                sources[path] = text(source, limit=300)
    return [
        {
            "path": text(path, limit=300),
            "value": text(value, "null"),
            "from": sources.get(path) or sources.get(f"{path}.0") or "",
        }
        for path, value in [*values.items()][:_MAX_VALUES]
    ]


def _base(starts: list[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    for _, start in reversed(starts):
        if base := mapping(start.get("base")):
            changes = [_change(change) for change in items(base.get("changes"))[:500]]
            return {"file": text(base.get("file")), "changes": changes}
    return None


def _change(change: Any) -> dict[str, str]:
    change = mapping(change)
    return {
        "path": text(change.get("path"), limit=300),
        "before": text(change.get("before"), "null", 500),
        "after": text(change.get("after"), "null", 500),
        "resume": text(change.get("resume"), limit=40),
    }


# --- checkpoints -----------------------------------------------------------------------------


def _checkpoints(
    folder: Path, config: Configuration, state: Mapping[str, Any], problems: Problems
) -> list[dict[str, Any]]:
    """List the checkpoints of a run, the oldest first; file sizes are compared, digests are not."""
    inner = "checkpoints"
    named = mapping(config.document.get("checkpoint")).get("folder")
    saved = text(mapping(state.get("checkpoint")).get("path"))
    if not isinstance(named, str) and saved and not path_problem(saved):
        named = os.path.dirname(saved)
    if isinstance(named, str) and named and not path_problem(named):
        inner = named
    names, root = _names(folder, inner, _STEP, problems), folder / inner
    names = [name for name in names if not (root / name).is_symlink()]
    if len(names) > _MAX_CHECKPOINTS:
        problems.add(f"of {len(names):,} checkpoints, the newest {_MAX_CHECKPOINTS} are shown")
    links = {}
    for link in ("best", "last"):
        with suppress(OSError):
            links[link] = os.readlink(root / link)
    return [
        _checkpoint(root / name, [link for link, target in links.items() if target == name])
        for name in names[-_MAX_CHECKPOINTS:]
    ]


def _checkpoint(path: Path, links: list[str]) -> dict[str, Any]:
    problems = Problems()
    manifest = read_object(path / "manifest.json", problems)
    size, damage = 0, problems[0] if problems else ""
    files = mapping(manifest.get("files"))
    for name, entry in files.items():
        expected = whole(mapping(entry).get("size"))
        try:
            if "/" in name or expected is None:
                raise OSError("not listed with a name and a size")
            descriptor = open_regular(path / name)
            found = os.fstat(descriptor).st_size
            os.close(descriptor)
        except (OSError, ValueError) as error:
            damage = damage or f"{text(name, limit=80)}: {reason_of(error)}"
            continue
        size += found
        if found != expected:
            damage = damage or f"{text(name, limit=80)} has {found} bytes, expected {expected}"
    if not files and not damage:
        damage = "there is no manifest.json" if not manifest else "the manifest lists no files"
    match = _STEP.fullmatch(path.name)
    metadata = mapping(manifest.get("metadata"))
    return {
        "name": path.name,
        "step": int(match[1]) if match else None,
        "saved_at": utc_time(manifest.get("saved_at")),
        "size_bytes": size,
        "links": links,
        "damage": damage,
        "non_finite": [text(name, limit=200) for name in items(manifest.get("non_finite"))[:5]],
        "reason": text(metadata.get("reason"), limit=500),
        "metadata": metadata,
        "metrics": {
            text(name, limit=200): value
            for name, value in [*mapping(manifest.get("metrics")).items()][:200]
            if type(value) in (int, float) and number(float(value)) is not None
        },
    }


# --- events and evaluations ------------------------------------------------------------------


def read_events(folder: Path, problems: Problems) -> list[dict[str, Any]]:
    """Read events.jsonl; of each kind, the newest are kept."""
    found: list[dict[str, Any]] = []
    total: Counter[str] = Counter()
    for event in read_lines(folder / "events.jsonl", problems):
        kind = text(event.get("event"), "event", 40)
        total[kind] += 1
        found.append(event_of(event))
        if len(found) > 200_000:
            del found[:100_000]
    omitted = {k: count - _MAX_EVENTS_OF_A_KIND for k, count in total.items()}
    kept: list[dict[str, Any]] = []
    for event in found:
        if omitted[event["event"]] > 0 and event["event"] not in ("start", "resume", "end"):
            omitted[event["event"]] -= 1
            continue
        kept.append(event)
    return kept


def event_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event of a line of events.jsonl, with values of known types."""
    return {
        "at": utc_time(record.get("at")),
        "event": text(record.get("event"), "event", 40),
        "step": whole(record.get("step")),
        "text": text(record.get("text"), limit=2000),
    }


def _events(
    folder: Path,
    checkpoints: list[dict[str, Any]],
    starts: list[tuple[str, dict[str, Any]]],
    problems: Problems,
) -> list[dict[str, Any]]:
    """Return the recorded events, or else those that other files show."""
    if found := read_events(folder, problems):
        return found
    derived = [
        {"at": c["saved_at"], "event": "save", "step": c["step"], "text": c["reason"] or c["name"]}
        for c in checkpoints
    ]
    for number_, (name, start) in enumerate(starts):
        kind = "resume" if number_ else "start"
        at = utc_time(start.get("started_at"))
        derived.append({"at": at, "event": kind, "step": None, "text": f"start {name}"})
    return sorted(derived, key=lambda event: event["at"] or "")


def _trace(folder: Path) -> dict[str, Any] | None:
    """Return name and size of the trace of a run's HookProfiler, or None."""
    with suppress(OSError, ValueError):
        descriptor = open_regular(folder / _TRACE)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        return {"file": _TRACE, "size_bytes": size}
    return None


def _evaluations(metrics: Metrics, modes: Mapping[str, Mode]) -> dict[str, Any]:
    """Return the table of evaluation metrics: columns with their best value, rows by step."""
    names = sorted(name for name in metrics.curves if name.startswith("eval/"))[:60]
    columns, steps, best_steps = [], set[int](), set[int]()
    for name in names:
        curve, mode = metrics.curves[name], modes.get(name) or guess_mode(name)
        best = None if mode is None else curve.best(mode)
        columns.append(
            {
                "name": text(name, limit=300),
                "mode": mode,
                "best_step": None if best is None else best[0],
                "best": None if best is None else best[1],
            }
        )
        steps.update(curve.steps)
        best_steps.update([best[0]] if best else [])
    shown = sorted({*sorted(steps)[-_MAX_EVALUATIONS:], *best_steps})
    values = [
        dict(zip(c.steps, c.values, strict=True)) for c in map(metrics.curves.get, names) if c
    ]
    rows = [
        [step, *(_cell(column[step]) if step in column else None for column in values)]
        for step in shown
    ]
    return {"columns": columns, "rows": rows, "omitted": len(steps) - len(shown)}


def _cell(value: float) -> float | str:
    found = number(value)
    return str(value) if found is None else found


def differing(runs: list[dict[str, Any]]) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the configuration values that differ, with the value of each run.

    Runs without a recorded configuration differ in nothing.
    """
    values = [{item["path"]: item["value"] for item in run["configuration"]} for run in runs]
    for path in dict.fromkeys(path for run in values for path in run):
        if len({run.get(path) for run in values if run}) > 1:
            yield path, [run.get(path) for run in values]
