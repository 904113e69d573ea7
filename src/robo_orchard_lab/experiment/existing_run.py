"""An existing run: checkpoints, state, and checks before a resume."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from robo_orchard_core.utils.config import TrustLike
from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError, describe
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.document import read_experiment, read_with_bases
from robo_orchard_lab.experiment.parts import ResumeEffect
from robo_orchard_lab.experiment.resume_diff import Difference, differences
from robo_orchard_lab.experiment.run_folder import (
    NoRunError,
    find_run,
    record_start,
    run_config_file,
)
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, ReadLimits, Retention
from robo_orchard_lab.pipeline.checkpoint.listing import Listing, RootListing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    BEST,
    LAST,
    LOCK,
    MANIFEST_FILE,
    step_from_name,
)
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hooks.save_checkpoint import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.durable import set_aside
from robo_orchard_lab.pipeline.run.run_path import check_run_path
from robo_orchard_lab.pipeline.run.run_state import RunState, read_run_state

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunCheckpoints:
    """Checkpoints of a run, with an optional selected checkpoint.

    Attributes:
        root: Folder of the checkpoints.
        chosen: Selected checkpoint; None for all checkpoints of the run.
        policy: Fields of ``SaveCheckpoint`` from the run's file.
    """

    root: Path
    chosen: Path | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)

    def retention(self, **changes: Any) -> Retention:
        """Return the retention policy of the run, with changes."""
        names = ("keep_last", "keep_every", "keep_best", "monitor", "mode")
        own = {name: self.policy[name] for name in names if self.policy.get(name) is not None}
        return Retention(**{**own, **changes})

    def pick(self, *, best: bool = False) -> Path:
        """Return the selected, the best, or the newest intact and healthy checkpoint.

        A damaged or non-finite checkpoint is skipped with a warning. If all intact ones are
        non-finite, the newest is returned with a warning.

        Raises:
            NoRunError: The run has no monitor that decides on the best checkpoint.
            CheckpointError: There is no intact checkpoint, or the best one is damaged.
        """
        if self.chosen is not None and not best:
            return self.chosen
        if best and self.policy.get("monitor") is None and not (self.root / BEST).is_symlink():
            raise NoRunError(
                f"no checkpoint in {self.root} is known as the best: the run has no "
                "checkpoint.monitor"
            )
        store = CheckpointStore(self.root, retention=self.retention())
        if best:
            [found] = store.verify(BEST)
            if found.problem is not None:
                raise CheckpointError(found.problem)
            return self.root / found.path.name
        listing = _listing(self.root)
        for info in listing.to_resume:
            [found] = store.verify(info.path)
            if found.problem is None:
                for newer in listing.infos[listing.infos.index(info) :]:
                    if newer.poison:
                        used = "using" if newer is info else "skipped"
                        logger.warning("%s %s: it %s", used, newer.path, newer.poison)
                return self.root / info.path.name
            logger.warning("skipped %s: %s", info.path, found.problem)
        raise CheckpointError(f"there is no intact checkpoint in {self.root}")


def find_checkpoints(path: str | os.PathLike[str]) -> RunCheckpoints:
    """Find the checkpoints of a run folder, of a folder of checkpoints, or of a checkpoint.

    The run folder of a script has no configuration file, but a folder of checkpoints.

    Raises:
        NoRunError: The path leads to none of these.
        ConfigError: The run's file can't be read.
    """
    path = Path(path)

    def policy_of(config: Path) -> Mapping[str, Any]:
        policy = read_with_bases(config)[0].document.get("checkpoint")  # plain: needs no trust
        return policy if isinstance(policy, dict) else {}

    is_checkpoint = (path / MANIFEST_FILE).is_file()
    if is_checkpoint or (path.is_dir() and any(map(_is_of_checkpoint, os.listdir(path)))):
        root = path if not is_checkpoint else (path.resolve() if path.is_symlink() else path).parent
        policy: Mapping[str, Any] = {}
        with suppress(ConfigError):
            policy = policy_of(find_run(root.absolute().parent).config)
        return RunCheckpoints(root, path if is_checkpoint else None, policy)
    if path.is_dir() and run_config_file(path) is None and (found := _root_of_script(path)):
        return RunCheckpoints(found)
    run = find_run(path)
    policy = policy_of(run.config)
    folder = policy.get("folder")
    root = run.folder / _folder_within_run(
        CHECKPOINTS_FOLDER if folder is None else folder, run.config
    )
    if not root.is_dir():
        raise NoRunError(f"the run in {run.folder} has no checkpoints: there is no {root}")
    return RunCheckpoints(root, run.checkpoint, policy)


def _listing(root: Path) -> Listing:
    return RootListing(root, ReadLimits()).read()


def _is_of_checkpoint(name: str) -> bool:
    return step_from_name(name) is not None or name in (LAST, LOCK)


def _root_of_script(folder: Path) -> Path | None:
    """Return the folder of checkpoints in the run folder of a script, or None.

    Raises:
        NoRunError: There are several, or the run saves its checkpoints elsewhere.
    """
    # A quarantine has folders of steps, but neither links nor locks.
    inside = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.is_symlink()]
    roots = [each for each in inside if os.path.lexists(each / LAST) or (each / LOCK).exists()]
    if len(roots) == 1:
        return roots[0]
    if roots:
        names = ", ".join(map(str, roots))
        raise NoRunError(f"expected one folder of checkpoints in {folder}, found {names}; name one")
    with suppress(FileNotFoundError, StateError):
        saved = read_run_state(folder).checkpoint
        where = f"there are none in {folder}"
        if saved is not None and os.path.lexists(folder / saved.path):
            where = f"they are in {(folder / saved.path).parent}; name that folder"
        raise NoRunError(f"expected a folder with checkpoints, found a run without: {where}")
    return None


def _folder_within_run(folder: Any, config: Path) -> Path:
    """Return the checkpoint folder of a run's file: no path out of the run, or through a link."""
    try:
        if not isinstance(folder, str):
            raise ConfigFieldError(
                f"expected a path within the run folder, found {describe(folder)}"
            )
        check_run_path(folder)
        for part in (PurePath(folder), *PurePath(folder).parents[:-1]):
            if (link := config.parent / part).is_symlink():
                raise ConfigFieldError(f"{link} is a link; name its target folder instead")
    except ConfigFieldError as error:
        error.source = os.fspath(config)
        raise error.under(("checkpoint", "folder")) from None
    return Path(folder)


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
    if root is not None and (infos := _listing(root).to_resume):
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
    experiment: ExperimentConfig, *, processes: int, changes: Sequence[Difference] = ()
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
    return record_start(experiment.folder(), text, processes=processes, changes=plain)
