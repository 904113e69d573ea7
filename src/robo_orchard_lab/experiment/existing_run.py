"""An existing run: checkpoints, state, and checks before a resume."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.config import TrustLike
from robo_orchard_core.utils.config.errors import ConfigError, dotted
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.document import ExperimentDocument, read_experiment
from robo_orchard_lab.experiment.initial_weights import WeightsReport
from robo_orchard_lab.experiment.parts import ResumeEffect
from robo_orchard_lab.experiment.resume_diff import Difference, differences
from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints, list_checkpoints
from robo_orchard_lab.experiment.run_folder import NoRunError, record_start, run_config_file
from robo_orchard_lab.pipeline.checkpoint.manifest import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.durable import set_aside
from robo_orchard_lab.pipeline.run.run_state import RunState, read_run_state

logger = job_logger(__name__)


class ChangedRunError(ConfigError):
    """Resume refused: the configuration changed more than the user allows.

    Attributes:
        changes: All differences, the worst first.
        worst: The worst effect among the differences.
    """

    def __init__(self, folder: Path, changes: Sequence[Difference]) -> None:
        self.changes = tuple(changes)
        self.worst: ResumeEffect = self.changes[0].resume
        fields = ", ".join(each.field for each in self.changes if each.resume == self.worst)
        verb = "can't resume" if self.worst == "impossible" else "would not train the same weights"
        super().__init__(f"the run in {folder} {verb} with changed {fields}")


@dataclass(frozen=True, slots=True)
class ExistingRun:
    """State of the run in a folder.

    Attributes:
        config: The file of the last start.
        newest_step: Step of the newest healthy checkpoint with an intact manifest, or else of the
            newest; None without checkpoints.
        state: Content of ``run_state.json``; None without the file, or with a damaged file.
    """

    folder: Path
    config: Path
    newest_step: int | None
    state: RunState | None

    @property
    def pid(self) -> int | None:
        """Process id of the run's first process."""
        return None if self.state is None else self.state.process.pid

    @property
    def is_running(self) -> bool:
        """Return True if another process certainly executes the run."""
        state = self.state
        return state is not None and state.state == "running" and state.process.is_another_running()

    @property
    def is_completed(self) -> bool:
        """Return True if the run reached its limit."""
        return self.state is not None and self.state.state == "completed"


def find_existing_run(folder: str | os.PathLike[str]) -> ExistingRun | None:
    """Return the state of the run in a folder, or None without a run.

    Damaged files next to the checkpoints do not stop a resume: the start of the run reports them,
    and moves them.
    """
    if (config := run_config_file(folder)) is None:
        return None
    step, state = None, None
    try:
        root = find_checkpoints(config).root
    except NoRunError:
        root = None
    except ConfigError:
        root = Path(folder) / CHECKPOINTS_FOLDER
    if root is not None and (infos := list_checkpoints(root).to_resume):
        step = infos[0].step
    with suppress(FileNotFoundError, StateError):
        state = read_run_state(folder)
    return ExistingRun(Path(folder), config, step, state)


def check_changes(
    experiment: ExperimentConfig,
    before: ExistingRun,
    trust: TrustLike,
    *,
    allow: ResumeEffect = "harmless",
) -> list[Difference]:
    """Compare an experiment with the run to resume, and log the differences.

    A warning says if the run's file is damaged, so that they can't be compared.

    Args:
        experiment: Configuration of the resumed run.
        before: Run to resume, with checkpoints.
        trust: Trust for reading the run's file.
        allow: The worst effect that is allowed.

    Raises:
        ChangedRunError: A difference has a worse effect.
    """
    try:
        document = read_experiment(before.config)
    except ConfigError as error:
        logger.warning("the experiment can't be compared with the run to resume: %s", error)
        return []
    old: Mapping[str, Any] = document.document
    with suppress(ConfigError):  # such as a class that was removed
        old = ExperimentConfig.from_document(document, trust).to_dict()  # with current defaults
    found = differences(
        {**old, "run_folder": None, "resume": None},
        {**experiment.to_dict(), "run_folder": None, "resume": None},
    )
    allowed = ("harmless",) if allow == "harmless" else ("harmless", "trajectory")
    if any(difference.resume not in allowed for difference in found):
        raise ChangedRunError(before.folder, found)
    for each in found:
        logger.info(
            "the run resumes with changed %s: %s, was %s (%s)",
            *(each.field, each.after, each.before, each.resume),
        )
    return found


def record(
    experiment: ExperimentConfig,
    *,
    processes: int,
    changes: Sequence[Difference] = (),
    initial_weights: WeightsReport | None = None,
) -> Path:
    """Record a start in the run folder, from one process of the job.

    The recorded file omits ``run_folder``, since the file lies there. It replaces that of the
    start before; a damaged one is moved.
    """
    text = experiment.replace(run_folder=None).to_str("yaml")
    if (config := run_config_file(experiment.folder())) is not None:
        try:
            read_experiment(config)
        except ConfigError as error:
            logger.warning("%s; the file is moved to %s", error, set_aside(config))
    plain: tuple[dict[str, Any], ...] = tuple(
        {"path": c.field, "before": c.before, "after": c.after, "resume": c.resume} for c in changes
    )
    weights = None if initial_weights is None else initial_weights.to_dict()
    return record_start(
        *(experiment.folder(), text),
        processes=processes,
        changes=plain,
        provenance={**_provenance(experiment.document), "initial_weights": weights},
    )


def _provenance(document: ExperimentDocument | None) -> dict[str, Any]:
    """Return the origin of each value, and the differences from the base file, as plain data."""
    if document is None:
        return {}
    sources = {dotted(path): str(origin) for path, origin in document.leaf_origins.items()}
    base = None
    with suppress(ConfigError, IndexError):  # the file was changed since, or has no base
        file = document.files[1]
        changes = differences(read_experiment(file).document, document.document)
        base = {
            "file": str(file),
            "changes": [{"path": c.field, "before": c.before, "after": c.after} for c in changes],
        }
    return {"sources": sources, "base": base}
