"""One checkpoint at any path: save, load, verify, export."""

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
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    FileLayout,
    StagingBuffer,
    StagingPool,
)
from robo_orchard_lab.pipeline.checkpoint.writer import FiniteCheck, StagedCheckpoint, put_new
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
    """Verify a checkpoint and load it to the CPU. A collective of ``ranks``.

    Args:
        path: directory of the checkpoint.
        limits: sizes that are refused before reading.
        ranks: processes that load together; by default this process alone.
        share_of: selects this process's share of job tensors and of sharded tensors; by default
            complete tensors.
        each_rank: called with the parts of each saved rank if the world size has changed; see
            :attr:`SavedState.rank_results`.

    Raises:
        CheckpointError: the checkpoint does not exist or does not verify.
    """
    ranks = ranks or Ranks.alone()
    found: list[SavedState] = []

    def read() -> None:
        with OpenCheckpoint(path, limits or ReadLimits()) as opened:
            count = opened.manifest.ranks
            if each_rank is None or count == ranks.count:
                found.append(opened.load(ranks.index, share_of))
                return
            saved = opened.load(None, share_of)
            results = []
            for index, state in enumerate(opened.all_rank_parts(share_of)):
                if index == opened.saved_rank(ranks.index):
                    saved = replace(saved, rank_parts=state)
                results.append(each_rank(index, count, state))
            found.append(replace(saved, rank_results=tuple(results)))

    ranks.run_on_all(f"loading {path}", read)
    return found[0]


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
    finite: FiniteCheck | None = None,
) -> CheckpointInfo:
    """Save one checkpoint durably to a new directory. A collective of ``ranks``.

    Args:
        folder: new directory at any path; missing parents are created.
        step, parts, rank_parts, metrics, metadata, finite: see :meth:`CheckpointStore.save`.
        digest: digest that a load verifies.
        ranks: processes that save together; by default this process alone.

    Raises:
        FileExistsError: the path exists; nothing is changed.
        StateError: a value can't be saved; the message names the value.
        CheckpointError: some rank can't write.
    """
    check_digest_name(digest)
    folder = Path(os.path.abspath(folder))
    ranks = ranks or Ranks.alone()
    made: list[StagedCheckpoint] = []

    def copy() -> None:
        if ranks.index == 0 and os.path.lexists(folder):
            raise FileExistsError(f"{folder} exists already; name a new directory")
        staged = StagedCheckpoint(
            step,
            parts,
            rank_parts,
            ranks=ranks,
            digest=digest,
            pool=StagingPool(pinned=False),
            limits=ReadLimits(),
            metrics=metrics,
            metadata=metadata,
            finite=finite,
        )
        made.append(staged)
        staged.copy()
        if ranks.index == 0:
            make_folder(folder.parent)

    ranks.run_on_all(f"saving {folder}", copy)
    return made[0].commit(folder, lambda: 0, lambda temporary: put_new(temporary, folder), ranks)


def verify_checkpoint(path: Path, limits: ReadLimits) -> Verification:
    """Compare all files of a checkpoint with their digests."""
    try:
        with OpenCheckpoint(path, limits) as opened:
            check_step(path, opened.manifest.step)
            opened.verify()
    except CheckpointError as error:
        return Verification(path, str(error))
    return Verification(path, None)


def write_weights(
    path: str | os.PathLike[str], weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file durably, replacing an existing file atomically.

    Raises:
        StateError: safetensors can't hold a tensor; the message names the tensor.
        OSError: the file can't be written; an existing file is unchanged.
    """
    file = pack_weights(weights, metadata)
    make_folder(Path(path).parent)
    replace_file(Path(path), file)


def pack_weights(
    weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> bytes | memoryview:
    """Return the contents of a safetensors file, copied to host memory; see `write_weights`."""
    tensors = {name: tensor.detach() for name, tensor in weights.items()}
    layout = FileLayout.of(tensors, metadata)
    (file,) = StagingBuffer(StagingBuffer.size_of([layout])).fill([(layout, tensors)])
    return file


def export_weights(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    part: str = "model",
    limits: ReadLimits | None = None,
) -> None:
    """Export the weights of a checkpoint to one safetensors file, with complete tensors.

    Shards are joined in one process, on the CPU, with twice the weights' memory. Other parts are
    not read. ``safetensors.torch.load_file`` reads the file.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file
    >>> from robo_orchard_lab.pipeline.checkpoint import save_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights = {"model": {"weight": torch.ones(2)}}
    ...     info = save_checkpoint(f"{folder}/step_00000001", 1, weights)
    ...     export_weights(info.path, f"{folder}/model.safetensors")
    ...     load_file(f"{folder}/model.safetensors")
    {'weight': tensor([1., 1.])}

    Args:
        checkpoint: directory of the checkpoint.
        path: file to write; an existing file is replaced atomically.
        part: part to export, a mapping of names to tensors.
        limits: sizes that are refused before reading.

    Raises:
        CheckpointError: the checkpoint does not exist, lacks the part, or does not verify.
        OSError: the file can't be written; an existing file is unchanged.
    """
    with OpenCheckpoint(checkpoint, limits or ReadLimits()) as opened:
        saved = opened.load(0, only=part)
    weights: Any = saved.parts.get(part)
    values = weights.values() if isinstance(weights, Mapping) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise CheckpointError(f"{saved.info.path} has no part {part!r} of tensors by name")
    write_weights(path, weights, {"format": "pt", "global_step_id": str(saved.info.step)})
