"""One checkpoint, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.info import (
    CheckpointInfo,
    EachRank,
    ReadLimits,
    SavedState,
    Verification,
)
from robo_orchard_lab.pipeline.checkpoint.listing import check_step
from robo_orchard_lab.pipeline.checkpoint.manifest import DigestName, check_digest_name
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.shards import ShareOf
from robo_orchard_lab.pipeline.checkpoint.staging_buffer import ImagePool
from robo_orchard_lab.pipeline.checkpoint.writer import CheckpointImage, put_new
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.run.durable import make_folder


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    limits: ReadLimits | None = None,
    ranks: Ranks | None = None,
    share_of: ShareOf | None = None,
    each_rank: EachRank | None = None,
) -> SavedState:
    """The state of the checkpoint in a folder, verified and on the CPU: a collective of ``ranks``.

    Args:
        path: of the folder.
        limits: what is refused unread.
        ranks: that load it together; by default this process alone.
        share_of: what this process needs of tensors that are the job's, or that several processes
            have saved in shards; by default all of them.
        each_rank: where another number of ranks saved it, called with what each of them had; see
            :attr:`SavedState.of_ranks`.

    Raises:
        CheckpointError: there is none, or not all of it is as it was written.
    """
    path, ranks = Path(path), ranks or Ranks.alone()
    limits = limits or ReadLimits()
    return load_on_ranks(path, limits, ranks, share_of, any_name=True, each_rank=each_rank)


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    parts: Mapping[str, Any],
    of_rank: Mapping[str, Any] | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    digest: DigestName = "xxh3_128",
    ranks: Ranks | None = None,
) -> CheckpointInfo:
    """Write one checkpoint, durably, to a folder that is not there yet: a collective of ``ranks``.

    Args:
        folder: any path; the folders above it are made.
        step, parts, of_rank, metrics, metadata: see :meth:`CheckpointStore.save`.
        digest: verifies it when it is loaded.
        ranks: the processes that save together; by default this one alone.

    Raises:
        FileExistsError: there is something by that name; it is left as it is.
        StateError: something can't be saved; the message names it.
        CheckpointError: it can't be written.
    """
    check_digest_name(digest)
    folder = Path(os.path.abspath(folder))
    ranks = ranks or Ranks.alone()
    what = f"saving {folder}"
    made: list[CheckpointImage] = []

    def copy() -> None:
        if ranks.index == 0 and os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists already; name a folder that doesn't")
        image = CheckpointImage(
            step,
            parts,
            of_rank,
            ranks=ranks,
            digest=digest,
            pool=ImagePool(pinned=False),
            limits=ReadLimits(),
            metrics=metrics,
            metadata=metadata,
        )
        made.append(image)
        if ranks.index == 0:
            make_folder(folder.parent)

    ranks.each(what, copy)
    return made[0].commit(folder, lambda: 0, lambda temporary: put_new(temporary, folder), ranks)


def load_on_ranks(
    path: Path,
    limits: ReadLimits,
    ranks: Ranks,
    share_of: ShareOf | None = None,
    *,
    any_name: bool = False,
    each_rank: EachRank | None = None,
) -> SavedState:
    """What each rank needs of a checkpoint: a collective.

    Args:
        share_of: what this rank needs of tensors; by default all of them.
        any_name: also where the folder is named for another step.
        each_rank: see :func:`load_checkpoint`.

    Raises:
        CheckpointError: some rank can't have it.
    """
    found: list[SavedState] = []

    def read() -> None:
        with OpenCheckpoint(path, limits) as opened:
            if not any_name:
                check_step(path, opened)
            count = opened.manifest.ranks
            if each_rank is None or count == ranks.count:
                found.append(opened.load(ranks.index, share_of))
                return
            saved = opened.load(None, share_of)
            kept = []
            for index, state in enumerate(opened.ranks(share_of)):
                if index == opened.saved_as(ranks.index):
                    saved = replace(saved, of_rank=state)
                kept.append(each_rank(index, count, state))
            found.append(replace(saved, of_ranks=tuple(kept)))

    ranks.each(f"loading {path}", read)
    return found[0]


def verify_checkpoint(path: Path, limits: ReadLimits) -> Verification:
    """Compare every file of a checkpoint with its digest."""
    try:
        with OpenCheckpoint(path, limits) as opened:
            check_step(path, opened)
            opened.verify()
    except CheckpointError as error:
        return Verification(path, str(error))
    return Verification(path, None)
