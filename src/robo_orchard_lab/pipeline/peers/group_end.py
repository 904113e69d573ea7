"""The end of the process group, ahead of the interpreter's."""

from __future__ import annotations

import atexit
import faulthandler
from contextlib import suppress

import torch.distributed as dist

_STUCK_S = 30.0

_registered = False


def leave_group_at_exit() -> None:
    """Have the process group destroyed when the process ends, where nobody has done it by then.

    Threads of gloo may hold tensors of what they have exchanged until then, and abort a process
    whose interpreter is gone when they let go of them.
    """
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    faulthandler.dump_traceback_later(_STUCK_S, exit=True)  # where it waits for a device
    with suppress(Exception):  # a group that is broken has ended, too
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
