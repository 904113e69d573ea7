"""The whole weights out of a checkpoint, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from robo_orchard_lab.pipeline.checkpoint.info import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.safetensors_layout import TensorLayout
from robo_orchard_lab.pipeline.checkpoint.staging_buffer import TensorImage
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_file

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
    layout = TensorLayout.of(tensors, metadata)
    (image,) = TensorImage(TensorImage.size_of([layout])).fill([(layout, tensors)])
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
