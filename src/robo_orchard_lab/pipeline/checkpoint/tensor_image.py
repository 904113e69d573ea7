"""Tensors as the bytes of files, in one block of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from robo_orchard_lab.pipeline.checkpoint.memory_blocks import bytes_of
from robo_orchard_lab.pipeline.checkpoint.tensor_layout import TensorLayout

_ALIGNMENT = 4096  # of each file, so that it can be written past the system's cache


def aligned_size(layout: TensorLayout) -> int:
    """How much of a block a file takes at most."""
    return layout.size + _ALIGNMENT


def write_image(
    block: torch.Tensor, files: Sequence[tuple[TensorLayout, Mapping[str, torch.Tensor]]]
) -> list[memoryview]:
    """Copy tensors of any device into a block, and wait for it: the contents of each file.

    Args:
        block: bytes on the CPU, of at least the sum of the :func:`aligned_size`.
        files: the layout of each, and its tensors by name.
    """
    images: list[memoryview] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    offset = -block.data_ptr() % _ALIGNMENT
    for layout, tensors in files:
        image = bytes_of(block[offset : offset + layout.size])
        image[: len(layout.beginning)] = layout.beginning
        data = image[len(layout.beginning) :]
        targets += [place.of(data) for place in layout.places]
        sources += [tensors[place.name] for place in layout.places]
        images.append(image)
        offset += layout.size + (-layout.size % _ALIGNMENT)
    _copy_all(targets, sources)
    return images


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    devices = set()
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            on_device = source.device.type != "cpu"
            target.copy_(source, non_blocking=on_device)
            if on_device:
                devices.add(source.device)
    for device in devices:
        torch.accelerator.synchronize(device)  # waits for the copies
