"""Batches and statistics with LeRobot's keys, for tests of policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CHUNK = 8


def make_statistics(state: int = 3, action: int = 2, cameras: Sequence[str] = ()) -> dict[str, Any]:
    """Return statistics of features: mean 1, std 2, range -3 to 5; images mean 0.5, std 0.25."""
    sizes = {"observation.state": state, "action": action}
    return {
        name: {"mean": [1.0] * n, "std": [2.0] * n, "min": [-3.0] * n, "max": [5.0] * n}
        for name, n in sizes.items()
    } | {
        f"observation.images.{camera}": {"mean": [[[0.5]]] * 3, "std": [[[0.25]]] * 3}
        for camera in cameras
    }


def make_batch(
    size: int = 4,
    state: int = 3,
    action: int = 2,
    cameras: Sequence[str] = (),
    seed: int = 0,
    pixels: int = 32,
) -> dict[str, torch.Tensor]:
    """Return a batch of random observations and chunks; the second sample ends after 3 frames."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(size, CHUNK, dtype=torch.bool)
    padding[1:2, 3:] = True
    return {
        "observation.state": torch.randn(size, state, generator=generator) * 2 + 1,
        "action": torch.randn(size, CHUNK, action, generator=generator) * 2 + 1,
        "action_is_pad": padding,
    } | {
        f"observation.images.{camera}": torch.rand(size, 3, pixels, pixels, generator=generator)
        for camera in cameras
    }
