"""Weights alone, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from robo_orchard_lab.pipeline.checkpoint.tensor_image import TensorImage
from robo_orchard_lab.pipeline.checkpoint.tensor_layout import TensorLayout
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_file


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
