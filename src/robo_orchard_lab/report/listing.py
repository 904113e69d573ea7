"""Runs below a folder, each with its state, length and best metric."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robo_orchard_lab.experiment.run_folder import (
    CONFIG_FILE,
    RUN_STATE,
    SUBMISSIONS,
    find_run,
    run_config_file,
)
from robo_orchard_lab.report.files import Problems, read_object
from robo_orchard_lab.report.jobs import SUBMISSION_FILE, Job, newest_submission, read_job
from robo_orchard_lab.report.position import read_position
from robo_orchard_lab.report.series import Metrics, Mode, guess_mode, read_metrics
from robo_orchard_lab.report.story import (
    Configuration,
    newest_commit,
    read_configuration,
    read_events,
    run_seconds,
)

_LEVELS = 6
_MAX_FOLDERS = 50_000
_INNER = {"checkpoints", "starts", "media", SUBMISSIONS, "wandb", "node_modules", "__pycache__"}


def is_run(folder: Path) -> bool:
    """Return True for the run folder of an experiment or a script, also of a waiting job."""
    is_started = (folder / RUN_STATE).is_file() or run_config_file(folder) is not None
    if is_started or (folder / "metrics.jsonl").is_file():
        return True
    submission = newest_submission(folder)
    return submission is not None and (submission / SUBMISSION_FILE).is_file()


def run_folder(path: Path) -> Path:
    """Return the run folder of a path: the folder, its config.yaml, or a checkpoint inside.

    Raises:
        NoRunError: the path leads to no run.
    """
    if path.name == CONFIG_FILE and path.is_file():
        path = path.parent
    return path if is_run(path) else find_run(path).folder


def find_runs(folder: Path) -> Iterator[Path]:
    """Iterate over the run folders in a folder and below, by name; links are not followed.

    Runs inside the folder of another run are listed as well.
    """
    visited = 0
    waiting = [(folder, 0)]
    while waiting and visited < _MAX_FOLDERS:
        current, level = waiting.pop()
        visited += 1
        try:
            if is_run(current):
                yield current
            if level == _LEVELS:
                continue
            with os.scandir(current) as entries:
                inner = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except (OSError, ValueError):  # an unreadable folder
            continue
        names = sorted((n for n in inner if n not in _INNER and n[0] != "."), reverse=True)
        waiting += [(current / name, level + 1) for name in names]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """State, length and best metric of a run.

    Attributes:
        stage: current stage of a run in progress, such as ``training``; else "".
        host: machine of the process; None if it is this one, or unknown.
        total_steps: steps of the complete run; None if unknown.
        seconds: time that the processes of the run spent; None if unknown.
        metric: name of the metric of ``best``; None without one.
        best: best value, or the last value if the metric has no known direction.
        commit: commit of the newest start.
        changed: True if the newest start had uncommitted changes.
        job: newest cluster job, by the files of the run; None without one.
        problems: descriptions of missing or damaged files.
    """

    path: Path
    state: str
    stage: str
    host: str | None
    steps: int | None
    total_steps: int | None
    epochs: int | None
    seconds: float | None
    metric: str | None
    mode: Mode | None
    best: float | None
    best_step: int | None
    commit: str | None
    changed: bool
    started_at: str | None
    updated_at: str | None
    job: Job | None
    problems: tuple[str, ...]

    @property
    def job_state(self) -> str | None:
        """State of the newest job."""
        return None if self.job is None else self.job.state

    @property
    def job_id(self) -> str | None:
        """Id of the newest job."""
        return None if self.job is None else self.job.id


def summarize(
    folder: Path, metric: str | None = None, config: Configuration | None = None
) -> RunSummary:
    """Summarize a run; never fails.

    Args:
        folder: run folder.
        metric: metric to show; by default that of the best checkpoint, or of the evaluations.
        config: configuration of the run, read if None.
    """
    problems = Problems()
    state = read_object(folder / RUN_STATE, problems)
    config = config or read_configuration(folder, problems)
    now = read_position(folder, config.metrics_file(folder), problems)
    prefix = "eval/" if metric is None else metric[:200]
    metrics = read_metrics(config.metrics_file(folder), problems, prefix)
    commit = newest_commit(folder, problems)
    name, mode, best = _best(metrics, config, metric)
    return RunSummary(
        path=folder,
        state=now.verdict["state"],
        stage=now.stage,
        host=now.host,
        steps=now.steps,
        total_steps=now.total_steps,
        epochs=now.epochs,
        seconds=run_seconds(state, read_events(folder, problems), now.at),
        metric=name,
        mode=mode,
        best=None if best is None else best[1],
        best_step=None if best is None else best[0],
        commit=None if commit is None else commit[0],
        changed=commit is not None and commit[1],
        started_at=now.verdict["started_at"],
        updated_at=now.at,
        job=read_job(folder, problems),
        problems=tuple(problems),
    )


def _best(
    metrics: Metrics, config: Configuration, metric: str | None
) -> tuple[str | None, Mode | None, tuple[int, float] | None]:
    """Return name, direction and best step and value of the metric to show."""
    declared = config.modes()
    known = [name for name in metrics.curves if declared.get(name) or guess_mode(name)]
    named = [metric] if metric is not None else [n for n in declared if n in metrics.curves]
    name = next(iter([*named, *sorted(known), *sorted(metrics.curves)]), None)
    curve = None if name is None else metrics.curves.get(name)
    if name is None or curve is None:
        return name, None, None
    mode = declared.get(name) or guess_mode(name)
    return name, mode, curve.last() if mode is None else curve.best(mode)
