"""Tensors that are divided among processes, as FSDP2 divides a model's parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``, of which each process has a part."""
    # Importing it takes 0.6 s, and where it was not imported, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def has_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one or more are divided among processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, in the same memory: all of it, where it is a plain one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_full_tensors(
    tensors: Mapping[str, torch.Tensor], *, keep: bool
) -> dict[str, torch.Tensor]:
    """Copies on the CPU, whole, of sharded tensors and others, one after the other: a collective.

    On the devices there is one whole tensor at a time. The processes have the same tensors in the
    same order.

    Args:
        tensors: by name; where none is sharded, there is no exchange.
        keep: whether this process wants them; else it only takes part, and gets none.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if is_sharded(value):
            value = value.full_tensor()  # a collective
        if keep:
            whole[name] = value.to("cpu", copy=True)
    return whole
