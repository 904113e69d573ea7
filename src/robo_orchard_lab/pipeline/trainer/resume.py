"""Going on from a checkpoint: which one, and how."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    EachRank,
    Ranks,
    SavedState,
    ShareOf,
    load_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import LAST, MANIFEST_FILE
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.save_checkpoint import CHECKPOINTS_FOLDER, SaveCheckpoint
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.sharding import shares_of_model
from robo_orchard_lab.pipeline.trainer.snapshot import RunSnapshots, ranks_of

logger = job_logger(__name__)

AUTO = "auto"


def resume(
    run: PipelineRun,
    hooks: PipelineHooks,
    snapshots: RunSnapshots,
    resume_from: str | os.PathLike[str],
) -> bool:
    """Make the run that of a checkpoint; called by all ranks alike.

    Args:
        run: the trainer's objects.
        hooks: of the run.
        snapshots: of the run; they load what was read.
        resume_from: a checkpoint's folder, or ``"auto"``.

    Returns:
        Whether there was one; with a folder there is, or it fails.

    Raises:
        Exception: as :class:`HookBasedTrainer` tells.
    """
    with ranks_of(run) as ranks:
        saved = _load_saved(
            resume_from,
            hooks,
            run.folder,
            ranks,
            snapshots.part_of_rank,
            shares_of_model(plain_model(run)),
        )
        if saved is None:
            return False
        ranks.run_on_all("resuming", partial(snapshots.load, saved))
        if os.fspath(resume_from) == AUTO:
            _prune(hooks, run.folder, ranks)
    logger.info("resumed from %s at %s", saved.info.path, run.progress)
    before, now = saved.info.ranks, run.accelerator.num_processes
    if before != now:
        logger.info("the run was saved by %d processes, and goes on with %d", before, now)
    return True


def _load_saved(
    resume_from: str | os.PathLike[str],
    hooks: PipelineHooks,
    run_folder: Path | None,
    ranks: Ranks,
    each_rank: EachRank,
    share_of: ShareOf | None,
) -> SavedState | None:
    """The saved run to go on from, all of it checked and on the CPU; called by all ranks alike.

    Args:
        resume_from: a checkpoint's folder, which is the one that is loaded, or none; or ``"auto"``
            for the newest that is whole, where the first :class:`SaveCheckpoint` keeps them.
        hooks: of the run.
        run_folder: where checkpoints are by default.
        ranks: of the job.
        each_rank: where another number of ranks saved, says what to keep of the state of each.
        share_of: what this rank needs of tensors; None for all of them.

    Returns:
        None with ``"auto"`` where there is no checkpoint yet.

    Raises:
        PipelineConfigError: with ``"auto"``, there is no folder to look in.
        StoreLockedError: with ``"auto"``, another run saves there.
        CheckpointError: the checkpoint can't be read or is damaged; with ``"auto"``, there are
            some, and all of them are.
    """
    if os.fspath(resume_from) != AUTO:
        path = Path(resume_from)
        ranks.run_on_first(f"looking for {path}", lambda: _check_is_one(path))
        return load_checkpoint(path, ranks=ranks, share_of=share_of, each_rank=each_rank)
    root = _root(hooks, run_folder)
    with CheckpointStore(root, ranks=ranks) as store:  # which also repairs what a crash has left
        saved = store.load_newest(share_of, each_rank)
    if saved is None:
        logger.info("no checkpoint in %s; the run starts from the beginning", root)
        return None
    for path, why in saved.skipped:
        logger.warning("resuming: skipped %s: %s", path, why)
    return saved


def _prune(hooks: PipelineHooks, run_folder: Path | None, ranks: Ranks) -> None:
    """Remove what a run that was killed would have; no reason to fail the next one."""
    for hook in hooks.all_hooks():
        if isinstance(hook, SaveCheckpoint):
            try:
                with hook.store(run_folder, ranks) as store:
                    store.prune()
            except CheckpointError as error:
                logger.warning("resumed; removing older checkpoints failed: %s", error)


def _check_is_one(path: Path) -> None:
    """Refuse a folder that has checkpoints in it, in place of the files of one."""
    for root in (path, path / CHECKPOINTS_FOLDER):
        if (root / LAST).exists() and not (path / MANIFEST_FILE).exists():
            raise CheckpointError(
                f"{path} is not a checkpoint, but has some: give one of them, such as "
                f"{root / LAST}, or resume_from={AUTO!r}"
            )


def _root(hooks: PipelineHooks, run_folder: Path | None) -> Path:
    for hook in hooks.all_hooks():
        if isinstance(hook, SaveCheckpoint):
            return hook.root(run_folder)
    if run_folder is None:
        raise PipelineConfigError(
            "resume_from='auto' has no folder to look in; register a SaveCheckpoint, or give the "
            "trainer a run_folder"
        )
    return run_folder / CHECKPOINTS_FOLDER
