"""The processes of the job, connected for what lies in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

_made: tuple[Any, Any] | None = None


def host_group() -> Any:
    """The process group to exchange CPU tensors by, so that no device is waited for.

    Made once for a job, where the job's own group has no CPU backend: a collective, so that all
    ranks have to ask for it first at the same place.
    """
    global _made
    world = torch.distributed.group.WORLD
    if "cpu:" in torch.distributed.get_backend_config():
        return world
    if _made is None or _made[0] is not world:
        _made = (world, torch.distributed.new_group(backend="gloo"))  # a collective, once
    return _made[1]
