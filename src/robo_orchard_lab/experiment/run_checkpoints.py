"""The checkpoints of a run, found by whatever path someone gives of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError, shown
from robo_orchard_lab.experiment.document import read_with_bases
from robo_orchard_lab.experiment.run_folder import NoRunError, run_at
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Retention
from robo_orchard_lab.pipeline.checkpoint.info import BEST, LAST, step_of
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.hooks.save_checkpoint import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.run_path import check_run_path

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
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


def checkpoints_at(path: str | os.PathLike[str]) -> CheckpointPlace:
    """Where the checkpoints are that are meant by a run, the folder of them, or one of them.

    Raises:
        NoRunError: it is none of these.
        ConfigError: the run's file can't be read.
    """
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file() and _has_some(path):
        return CheckpointPlace(path, policy=_policy_around(path))
    if (path / MANIFEST_FILE).is_file():
        root = path.resolve().parent if path.is_symlink() else path.parent
        return CheckpointPlace(root, path, _policy_around(root))
    place = run_at(path)
    policy = _policy_in(place.config)
    folder = policy.get("folder")
    root = place.folder / _within_run(
        CHECKPOINTS_FOLDER if folder is None else folder, place.config
    )
    if not root.is_dir():
        raise NoRunError(f"the run in {place.folder} has no checkpoints: there is no {root}")
    return CheckpointPlace(root, place.checkpoint, policy)


def _has_some(folder: Path) -> bool:
    return any(step_of(name) is not None or name == LAST for name in os.listdir(folder))


def _policy_in(config: Path) -> Mapping[str, Any]:
    """As it stands in the file of a run; nothing of it is built, so it needs no trust."""
    policy = read_with_bases(config)[0].document.get("checkpoint")
    return policy if isinstance(policy, dict) else {}


def _policy_around(root: Path) -> Mapping[str, Any]:
    """Of the run that checkpoints are of, as far as that can be found."""
    try:
        return _policy_in(run_at(root.absolute().parent).config)
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
                f"expected a path within the run's folder, found {shown(folder)}"
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
