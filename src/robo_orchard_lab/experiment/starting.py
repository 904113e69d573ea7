"""Starting a run in a folder that may have one already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.config import ConfigError, TrustLike
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.resume_diff import Difference, Resume, differences
from robo_orchard_lab.experiment.run_checkpoints import checkpoints_at
from robo_orchard_lab.experiment.run_folder import NoRunError, config_of_run, record_start
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.run_state import RunState, read_run_state

logger = job_logger(__name__)


class ChangedRunError(ConfigError):
    """A run can't go on by a configuration that differs from its own, or has to be told to.

    Attributes:
        folder: Of the run.
        changes: All differences, the worst first.
    """

    def __init__(self, folder: Path, changes: Sequence[Difference]) -> None:
        self.folder = folder
        self.changes = tuple(changes)
        self.worst: Resume = self.changes[0].resume
        told = ", ".join(each.place for each in self.changes if each.resume == self.worst)
        does = (
            "can't go on with other"
            if self.worst == "impossible"
            else "would be another with other"
        )
        super().__init__(f"the run in {folder} {does} {told}")


@dataclass(frozen=True, slots=True)
class RunBefore:
    """What a folder has of a run."""

    folder: Path
    config: Path
    """The file that it was last started with."""
    newest_step: int | None
    """Of its newest checkpoint whose manifest is whole; None where it has none."""
    state: RunState | None
    """What became of it; None where it hasn't come so far as to say so."""

    @property
    def pid(self) -> int | None:
        """The number of the process that is, or was, the first of it."""
        return None if self.state is None else self.state.process.pid

    @property
    def goes_on(self) -> bool:
        """Whether it is certain that another process is at it."""
        state = self.state
        return (
            state is not None and state.state == "running" and state.process.is_another_that_runs()
        )

    @property
    def is_completed(self) -> bool:
        """Whether it has come to its end."""
        return self.state is not None and self.state.state == "completed"


def run_before(folder: str | os.PathLike[str]) -> RunBefore | None:
    """What there is in the folder of a run; None where no run was started.

    Raises:
        ConfigError: its file can't be read.
        StateError: it has a `run_state.json` that can't be read.
    """
    config = config_of_run(folder)
    if config is None:
        return None
    try:
        infos = CheckpointStore(checkpoints_at(config).root).list()
    except NoRunError:
        infos = []
    try:
        state = read_run_state(folder)
    except FileNotFoundError:
        state = None
    return RunBefore(Path(folder), config, infos[-1].step if infos else None, state)


def check_changes(
    experiment: ExperimentConfig,
    before: RunBefore,
    trust: TrustLike,
    *,
    allow: Resume = "harmless",
) -> list[Difference]:
    """In what a run that goes on differs from what it was, once it may.

    Args:
        experiment: what it is to go on as.
        before: what there is of it, with checkpoints.
        trust: by which its file is read.
        allow: the worst that may be.

    Raises:
        ChangedRunError: there is a worse difference.
    """
    old = _document_of(before.config, trust)
    found = differences(
        {**old, "run_folder": None, "resume": None},
        {**experiment.to_dict(), "run_folder": None, "resume": None},
    )
    allowed = ("harmless",) if allow == "harmless" else ("harmless", "trajectory")
    if any(difference.resume not in allowed for difference in found):
        raise ChangedRunError(before.folder, found)
    for each in found:
        logger.info(
            "the run goes on with another %s: %s, was %s (%s)",
            *(each.place, each.after, each.before, each.resume),
        )
    return found


def record(
    experiment: ExperimentConfig, *, processes: int, changes: Sequence[Difference] = ()
) -> Path:
    """Write down a start in the run's folder, by one process of the job.

    The file in there leaves out ``run_folder``, which is where it lies.

    Raises:
        OSError: it can't be written.
    """
    text = experiment.replace(run_folder=None).to_str("yaml")
    told: tuple[dict[str, Any], ...] = tuple(
        {"path": c.place, "before": c.before, "after": c.after, "resume": c.resume} for c in changes
    )
    return record_start(experiment.folder(), text, processes=processes, changes=told)


def _document_of(config: Path, trust: TrustLike) -> dict[str, Any]:
    """With the defaults that fields have now, where it can be read so."""
    document = read_experiment(config)
    try:
        return ExperimentConfig.from_document(document, trust).to_dict()
    except ConfigError:
        return dict(document.document)  # it names what is no longer there
