"""The team's batch function."""

from __future__ import annotations

from typing import Any

import torch


def forward(model: Any, batch: Any, power: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs, and the mean of a power of the error."""
    x, y = batch
    outputs = model(x)
    return outputs, (outputs - y).abs().pow(power).mean()
