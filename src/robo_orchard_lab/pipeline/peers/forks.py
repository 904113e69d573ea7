"""Forks of a process whose other threads come to the interpreter for a moment."""

from __future__ import annotations

import os
import sys
import time

_PAUSE_S = 0.005

_registered = False


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
