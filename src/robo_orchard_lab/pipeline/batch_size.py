"""How many samples a batch has, and how many batches there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def count_samples(batch: Any) -> int:
    """The length of the first tensor in a batch, or 1 for a batch without one.

    >>> count_samples({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    >>> count_samples("text")
    1
    """
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], torch.Tensor):
        first: torch.Tensor = batch[0]  # as most batches are; half the time of looking around
        if first.dim() > 0:
            return len(first) or 1
    return first_length(batch) or 1


def count_batches(dataloader: Any) -> int | None:
    """How many batches one pass over the data has, or None where only passing over it tells.

    >>> count_batches([1, 2, 3]), count_batches(iter([1, 2, 3]))
    (3, None)
    """
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def first_length(value: Any) -> int | None:
    """The length of the first tensor in a nested batch, or None where there is none."""
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() > 0 else None
    if isinstance(value, (list, tuple)):
        parts: Iterable[Any] = value
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        return None
    for part in parts:  # half the time of a generator, and hooks count every batch
        length = first_length(part)
        if length is not None:
            return length
    return None
