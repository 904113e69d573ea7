"""The end of a process whose main thread does not come to it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from robo_orchard_lab.pipeline.errors import RankFailure

_STUCK_S = 5.0

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


def end_hard(failure: RankFailure, rank: int) -> None:
    """End this process at once, whatever its threads wait for: with 1, without a clean-up.

    What it has started goes first, and what it has printed comes out.
    """
    # Also where something below waits for a lock that a stuck thread has.
    faulthandler.dump_traceback_later(_STUCK_S, exit=True)
    with suppress(OSError):
        os.write(2, f"rank {rank}: ends, for {failure}\n".encode(errors="replace"))
    tell_hard_end(failure)
    for process in multiprocessing.active_children():
        with suppress(Exception):
            process.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)
