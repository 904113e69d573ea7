"""Large blocks of memory that are quick to come by."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

# Smaller ones are not worth a mapping of their own.
_MAPPED_FROM = 1 << 20


def new_block(size: int) -> torch.Tensor:
    """``size`` bytes on the CPU, of any content.

    A large one asks the system for large pages: writing to it for the first time is four times as
    fast as in pages of 4 KiB (307 MB: 23 ms in place of 100 ms).
    """
    if size < _MAPPED_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):  # which Linux has
        return torch.empty(size, dtype=torch.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)  # unmapped when no tensor refers to it


def bytes_of(block: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU, itself."""
    return block.numpy().data
