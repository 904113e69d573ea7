"""The end of the process group, ahead of the interpreter's."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
from contextlib import suppress

import torch.distributed as dist

_STUCK_S = 30.0
_LONGEST_END_S = 3.0  # of an interpreter; on other ranks, somebody may wait for this one

_registered = False


def leave_group_at_exit() -> None:
    """Have the process group destroyed when the process ends, where nobody has done it by then.

    Threads of gloo may hold tensors of what they have exchanged until then, and abort a process
    whose interpreter is gone when they let go of them. A process that an error ends is not kept by
    what its interpreter still has to take apart.
    """
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        faulthandler.dump_traceback_later(_STUCK_S, exit=True)  # where it waits for a device
        with suppress(Exception):  # a group that is broken has ended, too
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    if hasattr(sys, "last_value"):  # an error that nobody has caught, so that the code is 1 as well
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(_LONGEST_END_S, exit=True, file=nowhere)
