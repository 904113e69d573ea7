"""Sample dataset and model for a first run: no download, and training takes seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.utils.data import Dataset

TURNS = 1.25
"""Turns of an arm around the centre."""


class Spirals(Dataset[tuple[torch.Tensor, int]]):
    """Points on the arms of a spiral, each labelled with its arm.

    >>> points = Spirals(size=6, arms=3)
    >>> len(points), points[4][0].shape, [arm for _, arm in points]
    (6, torch.Size([2]), [0, 1, 2, 0, 1, 2])

    A sample is a float tensor of shape (2,), within about 1 of the centre, and the index of its
    arm. The points depend only on the arguments, in any process.

    Args:
        size: Number of points, >= 1; consecutive points lie on different arms.
        arms: Number of arms, >= 1.
        noise: Standard deviation of the distance to the arm, >= 0. Three arms are 0.27 apart along
            a ray.
        seed: Seed of the points; use another seed for evaluation.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, size: int = 3000, arms: int = 3, noise: float = 0.03, seed: int = 0) -> None:
        for name, value in (("size", size), ("arms", arms)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a number >= 0, got {noise}")
        generator = torch.Generator().manual_seed(seed)
        self.arms = arms
        self.labels = torch.arange(size) % arms
        along = torch.rand(size, generator=generator).sqrt()  # uniform density
        angle = 2 * math.pi * (self.labels / arms + TURNS * along)
        on_arm = along[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.points = on_arm + noise * torch.randn(size, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class MLP(torch.nn.Module):
    """Linear layers with ReLU in between.

    >>> MLP(inputs=2, hidden=[16, 16], outputs=3)(torch.zeros(5, 2)).shape
    torch.Size([5, 3])

    Args:
        inputs: Size of the last input dimension, >= 1.
        hidden: Widths of the hidden layers, each >= 1; an empty list makes a linear model.
        outputs: Size of the last output dimension, >= 1.

    Raises:
        ValueError: A width is below 1.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ValueError(f"the widths of an MLP must be >= 1, got {widths}")
        layers: list[torch.nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map a tensor of shape (..., inputs) to shape (..., outputs)."""
        outputs: torch.Tensor = self.layers(inputs)
        return outputs
