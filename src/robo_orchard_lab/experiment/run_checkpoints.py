"""Checkpoints of a run, found from its folder, a folder of checkpoints, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError, describe
from robo_orchard_lab.experiment.document import read_with_bases
from robo_orchard_lab.experiment.run_folder import NoRunError, find_run, run_config_file
from robo_orchard_lab.pipeline.checkpoint.listing import Listing, RootListing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    BEST,
    CHECKPOINTS_FOLDER,
    LAST,
    LOCK,
    MANIFEST_FILE,
    ReadLimits,
    step_from_name,
)
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.run.run_path import check_run_path

if TYPE_CHECKING:  # with torch
    from robo_orchard_lab.pipeline.checkpoint import Retention

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
        from robo_orchard_lab.pipeline.checkpoint import Retention

        names = ("keep_last", "keep_every", "keep_best", "monitor", "mode")
        own = {name: self.policy[name] for name in names if self.policy.get(name) is not None}
        return Retention(**{**own, **changes})

    def check_best(self) -> None:
        """Refuse one checkpoint where the best of a run is wanted.

        Raises:
            ConfigError: A checkpoint is selected.
        """
        if self.chosen is not None:
            raise ConfigError(
                f"expected a run folder to find its best weights, found the checkpoint "
                f"{self.chosen}; name the run folder, or leave out the best"
            )

    def pick(self, *, best: bool = False) -> Path:
        """Return the selected, the best, or the newest intact and healthy checkpoint.

        A damaged or non-finite checkpoint is skipped with a warning. If all intact ones are
        non-finite, the newest is returned with a warning.

        Raises:
            NoRunError: The run has no monitor that decides on the best checkpoint.
            ConfigError: The best is wanted of one checkpoint.
            CheckpointError: There is no intact checkpoint, or the best one is damaged.
        """
        from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

        if best:
            self.check_best()
        if self.chosen is not None:
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
        listing = list_checkpoints(self.root)
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


def list_checkpoints(root: Path) -> Listing:
    """List the checkpoints in a folder."""
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
    from robo_orchard_lab.pipeline.run.run_state import read_run_state  # imports torch

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
