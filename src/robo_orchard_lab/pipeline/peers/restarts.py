"""What a launcher's restart finds of the start before it."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented

logger = logging.getLogger(__name__)


def leave_addresses_behind() -> None:
    """Have a process that torchrun has started again meet the others where none has met before.

    torchrun keeps its store from one start to the next, so that processes find in it under which
    addresses those were reached that are gone, and fail, or wait for them, as soon as they connect
    (torch 2.13). Here they look under the number of their start, as older versions of torch had
    them do. Called when the package is imported, which is ahead of the process group.

    On several machines it is left alone: they count their starts each for itself. There,
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` has each start make a store of its own.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if start in ("", "0") or not kept or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    module = import_module("torch.distributed.rendezvous")  # as an attribute, it is a function
    make = getattr(module, "_create_c10d_store", None)
    if make is None or dist.is_initialized():
        logger.warning(
            "this is start %s of the job, which may find in torchrun's store the addresses of "
            "processes that are gone; import robo_orchard_lab.pipeline ahead of what sets up "
            "torch.distributed, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun",
            start,
        )
        return

    def make_store(*args: Any, **kwargs: Any) -> PrefixStore:
        return PrefixStore(f"start {start}", make(*args, **kwargs))

    module._create_c10d_store = make_store  # type: ignore[attr-defined]  # torch's own
