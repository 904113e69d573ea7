"""A dataset and a model to begin with: they need no download, and learn within seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.utils.data import Dataset

TURNS = 1.25
"""How far an arm winds around the centre."""


class Spirals(Dataset[tuple[torch.Tensor, int]]):
    """Points in the plane on the arms of a spiral, and on which arm each is.

    >>> points = Spirals(size=6, arms=3)
    >>> len(points), points[4][0].shape, [arm for _, arm in points]
    (6, torch.Size([2]), [0, 1, 2, 0, 1, 2])

    A sample is a float tensor of shape (2,), within about 1 of the centre, and the arm's number,
    from 0. The same arguments give the same points, in any process.

    Args:
        size: how many points, >= 1; the arms take turns.
        arms: how many arms, >= 1.
        noise: the standard deviation by which points lie off their arm, >= 0. From one of three
            arms to the next it is 0.27 along a ray.
        seed: of where the points lie; another one gives points to check with.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, size: int = 3000, arms: int = 3, noise: float = 0.03, seed: int = 0) -> None:
        for name, value in (("size", size), ("arms", arms)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a number >= 0, got {noise}")
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % arms
        along = torch.rand(size, generator=generator).sqrt()  # as dense far out as at the centre
        angle = 2 * math.pi * (self.labels / arms + TURNS * along)
        on_arm = along[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.points = on_arm + noise * torch.randn(size, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class MLP(torch.nn.Module):
    """Linear layers with a ReLU between each two.

    >>> MLP(inputs=2, hidden=[16, 16], outputs=3)(torch.zeros(5, 2)).shape
    torch.Size([5, 3])

    Args:
        inputs: numbers that go in, the size of the last dimension, >= 1.
        hidden: the widths of the layers between, each >= 1; none makes it linear.
        outputs: numbers that come out, >= 1.

    Raises:
        ValueError: a width is below 1.
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
        """Of a tensor of shape (..., inputs), one of shape (..., outputs)."""
        outputs: torch.Tensor = self.layers(inputs)
        return outputs
