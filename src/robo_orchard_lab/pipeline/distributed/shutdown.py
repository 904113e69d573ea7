"""What a launcher's restart finds of the start before it."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented

from robo_orchard_lab.pipeline.errors import RankFailure

# --- ending ----------------------------------------------------------------------------------
# How a process ends: with its process group, or at once, whatever its main thread waits for.


_STUCK_S = 5.0  # of what is done ahead of an end at once
_GROUP_STUCK_S = 30.0
_TAKEN_APART_S = 3.0  # an interpreter; on other ranks, somebody may wait for this one
LONGEST_EXIT_S = 10.0
"""From when the process group is gone, of a process that an error ends, in seconds."""

_registered = False
_before: list[Callable[[RankFailure], object]] = []


@contextmanager
def before_hard_end(tell: Callable[[RankFailure], object]) -> Iterator[None]:
    """Have something told, in another thread, where the process is ended meanwhile."""
    _before.append(tell)
    try:
        yield
    finally:
        with suppress(ValueError):  # it was told
            _before.remove(tell)


def tell_hard_end(failure: RankFailure) -> None:
    """Tell all that is to be told ahead of the end, once."""
    while _before:
        with suppress(Exception):
            _before.pop()(failure)


def end_hard(
    failure: RankFailure,
    rank: int,
    first: Callable[[], object] | None = None,
    first_s: float = 0.0,
) -> None:
    """End this process at once, whatever its threads wait for: with 1, without a clean-up.

    What it has started goes first, and what it has printed comes out.

    Args:
        failure: for which it ends.
        rank: of this process.
        first: what is done ahead of the end.
        first_s: how long that may wait for others, in seconds.
    """
    # Also where something below waits for a lock that a stuck thread has, or for a disk.
    faulthandler.dump_traceback_later(_STUCK_S + first_s, exit=True)
    with suppress(OSError):
        os.write(2, f"rank {rank}: ends, for {failure}\n".encode(errors="replace"))
    if first is not None:
        with suppress(Exception):
            first()
    tell_hard_end(failure)
    for process in multiprocessing.active_children():
        with suppress(Exception):
            process.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)


def leave_group_at_exit() -> None:
    """Have the process group destroyed when the process ends, where nobody has done it by then.

    Threads of gloo may hold tensors of what they have exchanged until then, and abort a process
    whose interpreter is gone when they let go of them. What else is to be done at the exit of a
    process that an error ends, such as to send what was tracked, has ten seconds, and three of them
    to take the interpreter apart, since its launcher and the other ranks wait for it.
    """
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        faulthandler.dump_traceback_later(_GROUP_STUCK_S, exit=True)  # where it waits for a device
        with suppress(Exception):  # a group that is broken has ended, too
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    if hasattr(sys, "last_value"):  # an error that nobody has caught, so that the code is 1 as well
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(_TAKEN_APART_S, exit=True, file=nowhere)
        with suppress(RuntimeError):  # Python 3.12.0 starts no thread any more
            threading.Thread(target=_put_off_end, args=(nowhere,), daemon=True).start()


def _put_off_end(nowhere: int) -> None:
    """As long as functions are called at exit: when all is taken apart, threads don't go on."""
    ends_at = time.monotonic() + LONGEST_EXIT_S - _TAKEN_APART_S
    while time.monotonic() < ends_at:
        time.sleep(0.5)
        faulthandler.dump_traceback_later(_TAKEN_APART_S, exit=True, file=nowhere)
    faulthandler.dump_traceback_later(_TAKEN_APART_S, exit=True)  # telling what takes so long


# --- forks -----------------------------------------------------------------------------------
# Forks of a process whose other threads come to the interpreter for a moment.


_PAUSE_S = 0.005


def let_threads_pass_ahead_of_forks() -> None:
    """Have a fork wait for five milliseconds, in which other threads get the interpreter.

    When an exchange is over, gloo's thread lets go of its tensors, for which it becomes a thread of
    the interpreter. Up to Python 3.11, a process that is forked in that very moment, as a loader's
    worker is, waits for ever for a lock that the thread has had (python/cpython#112275, mended in
    3.12). Done once; in a newer Python, nothing is done.
    """
    global _registered
    if not _registered and sys.version_info < (3, 12) and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(before=lambda: time.sleep(_PAUSE_S))


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
