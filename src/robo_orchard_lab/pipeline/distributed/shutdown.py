"""Start and end of a process in a job: forced exit, process group, forks, restarts."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented

from robo_orchard_lab.pipeline.errors import RankFailure

_STUCK_S = 5.0  # for the work before a forced exit
_GROUP_STUCK_S = 30.0
_FINALIZE_S = 3.0  # for the interpreter to finalize; other ranks may wait for this exit
MAX_EXIT_S = 10.0
"""Maximum time from the destruction of the process group to the exit after an error, in s."""

_destroys_group = False
_pauses_before_forks = False
_callbacks: list[Callable[[RankFailure], object]] = []


@contextmanager
def before_forced_exit(callback: Callable[[RankFailure], object]) -> Iterator[None]:
    """Call ``callback`` in another thread before a forced exit during the body."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        with suppress(ValueError):  # already called
            _callbacks.remove(callback)


def notify_forced_exit(failure: RankFailure) -> None:
    """Call all callbacks of :func:`before_forced_exit`, once."""
    while _callbacks:
        with suppress(Exception):
            _callbacks.pop()(failure)


def force_exit(
    failure: RankFailure, rank: int, first: Callable[[], object] | None = None, first_s: float = 0.0
) -> None:
    """Exit with code 1 at once, without cleanup, even if other threads are stuck.

    Calls ``first``, which may wait ``first_s`` seconds for other ranks, kills child processes and
    flushes the output streams.
    """
    # Exits also if a call below waits for a disk, or for a lock of a stuck thread.
    faulthandler.dump_traceback_later(_STUCK_S + first_s, exit=True)
    with suppress(OSError):
        os.write(2, f"rank {rank}: exiting: {failure}\n".encode(errors="replace"))
    if first is not None:
        with suppress(Exception):
            first()
    notify_forced_exit(failure)
    for process in multiprocessing.active_children():
        with suppress(Exception):
            process.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)


def destroy_group_at_exit() -> None:
    """Destroy the process group at exit, unless done before.

    Gloo's threads may hold tensors until then, and abort a process that releases them after the
    interpreter is finalized. After an error, other exit functions, such as those of trackers, have
    ten seconds in total, since the launcher and the other ranks wait for this process.
    """
    global _destroys_group
    if not _destroys_group:
        _destroys_group = True
        atexit.register(_destroy_group)


def _destroy_group() -> None:
    if dist.is_initialized():
        faulthandler.dump_traceback_later(_GROUP_STUCK_S, exit=True)  # if it waits for a device
        with suppress(Exception):  # a broken group
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    if hasattr(sys, "last_value"):  # an uncaught error: the exit code is 1 as well
        devnull = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(_FINALIZE_S, exit=True, file=devnull)
        with suppress(RuntimeError):  # Python 3.12.0 starts no threads at exit
            threading.Thread(target=_postpone_exit, args=(devnull,), daemon=True).start()


def _postpone_exit(devnull: int) -> None:
    """Postpone the exit while exit functions run; threads stop when the interpreter finalizes."""
    ends_at = time.monotonic() + MAX_EXIT_S - _FINALIZE_S
    while time.monotonic() < ends_at:
        time.sleep(0.5)
        faulthandler.dump_traceback_later(_FINALIZE_S, exit=True, file=devnull)
    faulthandler.dump_traceback_later(_FINALIZE_S, exit=True)  # prints the stacks


_PAUSE_S = 0.005  # before a fork


def pause_before_forks() -> None:
    """Make forks wait for five milliseconds, in which other threads can finish; once.

    After a collective, gloo's thread briefly takes part in the interpreter to release its tensors.
    Up to Python 3.11, a process forked at that moment, such as a loader's worker, waits forever for
    a lock of that thread (python/cpython#112275, fixed in 3.12). Does nothing in newer versions.
    """
    global _pauses_before_forks
    if not _pauses_before_forks and sys.version_info < (3, 12) and hasattr(os, "register_at_fork"):
        _pauses_before_forks = True
        os.register_at_fork(before=lambda: time.sleep(_PAUSE_S))


def init_process_group_after_restart(backend: str | None = None) -> bool:
    """Initialize the process group of a job that torchrun has restarted on one machine.

    torchrun keeps its store over restarts (torch 2.13), so restarted processes read the addresses
    of dead processes, and fail or hang when they connect. This function initializes the group under
    a new prefix in the store, with torch's default ``backend`` if None. Call it before the
    Accelerator is created, in a script that is started with ``torchrun --max-restarts``; the
    command line calls it.

    Does nothing, and returns False, in the first start, without torchrun, with an initialized
    group, and on several machines, which count restarts separately. There, set
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if start in ("", "0") or not keeps_store or not is_one_machine or dist.is_initialized():
        return False
    world_size = int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False
    )
    dist.init_process_group(
        backend,
        store=PrefixStore(f"start {start}", store),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
    )
    return True
