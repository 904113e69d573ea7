"""The arithmetic of a loss that comes with a weight."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from robo_orchard_lab.pipeline.errors import BatchProcessorError


def checked_weight(weight: Any, loss: torch.Tensor) -> torch.Tensor:
    """What a batch processor says that a loss weighs, as a tensor of its own on the loss's device.

    The value of a tensor is not looked at, which would wait for the device.

    Raises:
        BatchProcessorError: it is no weight.
    """
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        # A copy: the processor may write its next weight into the same tensor.
        return weight.detach().reshape(()).to(device=loss.device, dtype=dtype, copy=True)
    number = isinstance(weight, Real) and not isinstance(weight, bool)  # NumPy's as well
    if not number or not 0 <= weight < math.inf:
        raise BatchProcessorError(
            "the weight of a loss must be a number >= 0 or a tensor of one, such as how many "
            f"tokens it is the mean of; got {weight!r:.80}"
        )
    return torch.full((), float(weight), dtype=dtype, device=loss.device)


def counted_loss(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loss, or zero where it weighs nothing: the mean over nothing may be NaN."""
    return torch.where(weight > 0, loss, 0.0)
