"""How many samples a batch has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def count_samples(batch: Any) -> int:
    """The length of the first tensor in a batch, or 1 for a batch without one.

    >>> count_samples({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    >>> count_samples("text")
    1
    """
    return _first_length(batch) or 1


def _first_length(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() > 0 else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return None
    return next((n for n in map(_first_length, value) if n is not None), None)
