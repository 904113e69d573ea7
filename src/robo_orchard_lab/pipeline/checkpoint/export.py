"""The whole weights out of a checkpoint, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.weights_file import write_weights
from robo_orchard_lab.pipeline.errors import CheckpointError


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
