"""The arithmetic of losses that come with weights, in a run and in the replay of a part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from robo_orchard_lab.pipeline.errors import BatchProcessorError
from robo_orchard_lab.pipeline.sharded_tensors import local_part


@dataclass(frozen=True, slots=True)
class LossWeighting:
    """What made the gradients of an accumulation window those of its weighted mean."""

    reference: torch.Tensor
    """What weights are divided by ahead of the backward pass, so that half precision holds them."""
    gradient_factor: torch.Tensor
    """What all gradients are multiplied by at the end of the window."""


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


def weighed_loss(loss: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """What to run the backward pass of, in the place of a mean loss of such a weight."""
    return loss * (weight / reference).to(loss.dtype)


def multiply_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply the gradients that there are; each process what it has of them."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            by_device.setdefault(gradient.device, []).append(gradient)
    with torch.no_grad():
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, factor.to(device))
