"""Utilities for training scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robo_orchard_core.utils.logging import log_basic_config

__all__ = ["as_sequence", "log_basic_config", "seed_everything"]


def seed_everything(seed: int) -> int:
    """Seed the RNGs of Python, NumPy and torch on all devices, and return the seed.

    Call it before the model is created. A trainer's data order has a seed of its own, see
    ``DataOrder``; an experiment file has the field ``seed``.

    Raises:
        ValueError: the seed is not an int from 0 to 2**32 - 1, the range of NumPy.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"expected a seed from 0 to {2**32 - 1}, found {seed!r:.60}")
    from accelerate.utils import set_seed  # here, since the module is torch-free

    set_seed(seed)
    return seed


def as_sequence(value: Any) -> Sequence[Any]:
    """Return a list or tuple unchanged, any other value in a list, and None as an empty list.

    >>> as_sequence([1, 2]), as_sequence("text"), as_sequence(None)
    ([1, 2], ['text'], [])
    """
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]
