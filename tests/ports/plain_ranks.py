"""Mean gradients, shared buffers and autocast of plain torch loops; nothing in fp32 on one rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed, nn


def rank_and_world_size() -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks."""
    _, world_size = rank_and_world_size()
    for parameter in parameters:
        if world_size > 1 and parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0, such as running statistics, to all ranks."""
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def autocast(precision: str) -> torch.autocast:
    caches = not torch.__version__.startswith("2.8.")  # as the trainer's autocast
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=caches)
