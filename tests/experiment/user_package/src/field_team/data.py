"""The team's data."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class Furrows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Noisy points on a line."""

    def __init__(self, rows: int, noise: float = 0.0, start: int = 0) -> None:
        generator = torch.Generator().manual_seed(start)
        self.x = torch.linspace(-1, 1, rows).unsqueeze(1)
        self.y = 3 * self.x + 1 + noise * torch.randn(rows, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]
