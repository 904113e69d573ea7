"""The checkpoints of a run, found by whatever path someone gives of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from robo_orchard_core.utils.config import TrustLike
from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError, describe
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.document import read_experiment, read_with_bases
from robo_orchard_lab.experiment.resume_diff import Difference, Resume, differences
from robo_orchard_lab.experiment.run_folder import (
    NoRunError,
    find_run,
    record_start,
    run_config_file,
)
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Retention
from robo_orchard_lab.pipeline.checkpoint.manifest import BEST, LAST, MANIFEST_FILE, step_from_name
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.hooks.save_checkpoint import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.run_path import check_run_path
from robo_orchard_lab.pipeline.run.run_state import RunState, read_run_state

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunCheckpoints:
    """Where checkpoints are, and which one is meant."""

    root: Path
    """The folder that has them."""
    chosen: Path | None = None
    """The one that was named; None where all were."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """What the run's file says of its checkpoints: fields of ``SaveCheckpoint``."""

    def retention(self, **given: Any) -> Retention:
        """What the run keeps, or what is given instead.

        Raises:
            PipelineConfigError: these don't go together.
        """
        names = ("keep_last", "keep_every", "keep_best", "monitor", "mode")
        said = {name: self.policy[name] for name in names if self.policy.get(name) is not None}
        return Retention(**{**said, **given})

    def pick(self, *, best: bool = False) -> Path:
        """The one that is meant: that which was named, the best, or the newest that is whole.

        Which ones are passed over since they are not as they were written, the log says.

        Raises:
            NoRunError: nothing says which one is best.
            CheckpointError: there is none, or the best one is not as it was written.
        """
        if self.chosen is not None and not best:
            return self.chosen
        if best and self.policy.get("monitor") is None and not (self.root / BEST).is_symlink():
            raise NoRunError(
                f"nothing says which checkpoint in {self.root} is best: the run has no "
                "checkpoint.monitor"
            )
        store = CheckpointStore(self.root, retention=self.retention())
        if best:
            [found] = store.verify(BEST)
            if found.problem is not None:
                raise CheckpointError(found.problem)
            return self.root / found.path.name
        for info in reversed(store.list()):
            [found] = store.verify(info.path)
            if found.problem is None:
                return self.root / info.path.name
            logger.warning("passed over %s: %s", info.path, found.problem)
        raise CheckpointError(f"there is no whole checkpoint in {self.root}")


def find_checkpoints(path: str | os.PathLike[str]) -> RunCheckpoints:
    """Where the checkpoints are that are meant by a run, the folder of them, or one of them.

    Raises:
        NoRunError: it is none of these.
        ConfigError: the run's file can't be read.
    """
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file() and _has_some(path):
        return RunCheckpoints(path, policy=_policy_around(path))
    if (path / MANIFEST_FILE).is_file():
        root = path.resolve().parent if path.is_symlink() else path.parent
        return RunCheckpoints(root, path, _policy_around(root))
    place = find_run(path)
    policy = _policy_in(place.config)
    folder = policy.get("folder")
    root = place.folder / _within_run(
        CHECKPOINTS_FOLDER if folder is None else folder, place.config
    )
    if not root.is_dir():
        raise NoRunError(f"the run in {place.folder} has no checkpoints: there is no {root}")
    return RunCheckpoints(root, place.checkpoint, policy)


def _has_some(folder: Path) -> bool:
    return any(step_from_name(name) is not None or name == LAST for name in os.listdir(folder))


def _policy_in(config: Path) -> Mapping[str, Any]:
    """As it stands in the file of a run; nothing of it is built, so it needs no trust."""
    policy = read_with_bases(config)[0].document.get("checkpoint")
    return policy if isinstance(policy, dict) else {}


def _policy_around(root: Path) -> Mapping[str, Any]:
    """Of the run that checkpoints are of, as far as that can be found."""
    try:
        return _policy_in(find_run(root.absolute().parent).config)
    except ConfigError:
        return {}


def _within_run(folder: Any, config: Path) -> Path:
    """A folder that a run's file names, from the run's own on.

    Raises:
        ConfigFieldError: it leads out of that, or behind a link.
    """
    try:
        if not isinstance(folder, str):
            raise ConfigFieldError(
                f"expected a path within the run's folder, found {describe(folder)}"
            )
        check_run_path(folder)
        for part in (PurePath(folder), *PurePath(folder).parents[:-1]):
            if (link := config.parent / part).is_symlink():
                raise ConfigFieldError(
                    f"{link} is a link; give the folder that it leads to, if that is meant"
                )
    except ConfigFieldError as error:
        error.source = os.fspath(config)
        raise error.under(("checkpoint", "folder")) from None
    return Path(folder)


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
        told = ", ".join(each.field for each in self.changes if each.resume == self.worst)
        does = (
            "can't go on with other"
            if self.worst == "impossible"
            else "would be another with other"
        )
        super().__init__(f"the run in {folder} {does} {told}")


@dataclass(frozen=True, slots=True)
class ExistingRun:
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
    def is_running(self) -> bool:
        """Whether it is certain that another process is at it."""
        state = self.state
        return (
            state is not None and state.state == "running" and state.process.is_another_that_runs()
        )

    @property
    def is_completed(self) -> bool:
        """Whether it has come to its end."""
        return self.state is not None and self.state.state == "completed"


def find_existing_run(folder: str | os.PathLike[str]) -> ExistingRun | None:
    """What there is in the folder of a run; None where no run was started.

    Raises:
        ConfigError: its file can't be read.
        StateError: it has a `run_state.json` that can't be read.
    """
    config = run_config_file(folder)
    if config is None:
        return None
    try:
        infos = CheckpointStore(find_checkpoints(config).root).list()
    except NoRunError:
        infos = []
    try:
        state = read_run_state(folder)
    except FileNotFoundError:
        state = None
    return ExistingRun(Path(folder), config, infos[-1].step if infos else None, state)


def check_changes(
    experiment: ExperimentConfig,
    before: ExistingRun,
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
            *(each.field, each.after, each.before, each.resume),
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
        {"path": c.field, "before": c.before, "after": c.after, "resume": c.resume} for c in changes
    )
    return record_start(experiment.folder(), text, processes=processes, changes=told)


def _document_of(config: Path, trust: TrustLike) -> dict[str, Any]:
    """With the defaults that fields have now, where it can be read so."""
    document = read_experiment(config)
    try:
        return ExperimentConfig.from_document(document, trust).to_dict()
    except ConfigError:
        return dict(document.document)  # it names what is no longer there
