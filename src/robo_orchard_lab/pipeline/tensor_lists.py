"""In-place operations on lists of tensors, by a fused kernel of torch where available.

torch has no public name for its fused kernels. Without them, one kernel per tensor runs.
"""

from __future__ import annotations

import torch


def multiply_all(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors by a tensor of one element, all on one device."""
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target; dtypes may differ."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
