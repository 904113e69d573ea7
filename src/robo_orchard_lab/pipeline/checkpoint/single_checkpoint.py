"""One checkpoint, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint.listing import check_step
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    CheckpointInfo,
    DigestName,
    EachRank,
    ReadLimits,
    SavedState,
    Verification,
    check_digest_name,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.shards import ShareOf
from robo_orchard_lab.pipeline.checkpoint.tensor_files import FileLayout, StagingBuffer, StagingPool
from robo_orchard_lab.pipeline.checkpoint.writer import StagedCheckpoint, put_new
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_file


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
            :attr:`SavedState.rank_results`.

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
    rank_parts: Mapping[str, Any] | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    digest: DigestName = "xxh3_128",
    ranks: Ranks | None = None,
) -> CheckpointInfo:
    """Write one checkpoint, durably, to a folder that is not there yet: a collective of ``ranks``.

    Args:
        folder: any path; the folders above it are made.
        step, parts, rank_parts, metrics, metadata: see :meth:`CheckpointStore.save`.
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
    made: list[StagedCheckpoint] = []

    def copy() -> None:
        if ranks.index == 0 and os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists already; name a folder that doesn't")
        image = StagedCheckpoint(
            step,
            parts,
            rank_parts,
            ranks=ranks,
            digest=digest,
            pool=StagingPool(pinned=False),
            limits=ReadLimits(),
            metrics=metrics,
            metadata=metadata,
        )
        made.append(image)
        if ranks.index == 0:
            make_folder(folder.parent)

    ranks.run_on_all(what, copy)
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
                    saved = replace(saved, rank_parts=state)
                kept.append(each_rank(index, count, state))
            found.append(replace(saved, rank_results=tuple(kept)))

    ranks.run_on_all(f"loading {path}", read)
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


# --- weights file ----------------------------------------------------------------------------
# Weights alone, in one file.


def write_weights(
    path: str | os.PathLike[str], weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, which replaces what is there when it is on the disk.

    Raises:
        StateError: a tensor is of a kind that a file can't have; the message names it.
        OSError: it can't be written; what is there stays.
    """
    path = Path(path)
    tensors = {name: tensor.detach() for name, tensor in weights.items()}
    layout = FileLayout.of(tensors, metadata)
    (image,) = StagingBuffer(StagingBuffer.size_of([layout])).fill([(layout, tensors)])
    make_folder(path.parent)
    replace_file(path, image)


def export_weights(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    part: str = "model",
    limits: ReadLimits | None = None,
) -> None:
    """Write the weights of a checkpoint as one safetensors file, by the names of the plain model.

    Of sharded ones, which each process has saved a part of, this makes whole ones. It takes one
    process, no devices, and the memory of the weights twice; what else the checkpoint has is not
    read. ``safetensors.torch.load_file`` reads the file.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from safetensors.torch import load_file
    >>> from robo_orchard_lab.pipeline.checkpoint import save_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights = {"model": {"weight": torch.ones(2)}}
    ...     info = save_checkpoint(f"{folder}/step_00000001", 1, weights)
    ...     export_weights(info.path, f"{folder}/model.safetensors")
    ...     load_file(f"{folder}/model.safetensors")
    {'weight': tensor([1., 1.])}

    Args:
        checkpoint: its folder.
        path: the file to write; one that is there is replaced as a whole.
        part: of the checkpoint; a mapping of names to tensors.
        limits: of what is read.

    Raises:
        CheckpointError: there is no such checkpoint, it has no such part, or not all of that is as
            it was written.
        OSError: the file can't be written; what is there stays.
    """
    with OpenCheckpoint(checkpoint, limits or ReadLimits()) as opened:
        saved = opened.load(0, only=part)
    weights = saved.parts.get(part)
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise CheckpointError(f"{saved.info.path} has no part {part!r} of tensors by name")
    about = {"format": "pt", "global_step_id": str(saved.info.step)}
    write_weights(path, weights, about)
