"""Worker processes of data loaders that leave signals to the process that they work for.

A signal that is to end a job often goes to all of its processes: Ctrl-C, a scheduler's SIGTERM. A
worker that dies of it has its main process fail in the middle of a step, or wait for data that
never comes, when it could have saved the run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeAlias

WorkerInit: TypeAlias = Callable[[int], object]

_LAST_WAIT_S = 1.0  # for processes that clean up when they are told to end

_taken: tuple[int, ...] = ()  # of the whole process, as its handlers are
_started: set[BaseProcess] = set()  # while signals were taken, and not ended with that


@contextmanager
def taken_by_main_process(signals: Iterable[int]) -> Iterator[None]:
    """Have workers that are started meanwhile outlive these signals.

    Only workers with a :class:`LeavesSignals` do. They ignore them, but for SIGTERM: the second one
    ends a worker, since that is how a main process ends one that hangs. Workers that are still
    there when this process ends, such as persistent ones, are ended with it.
    """
    global _taken
    before, _taken = _taken, tuple(signals)
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        _taken = before
        ours = set(multiprocessing.active_children()).difference(others)
        _started.update(child for child in ours if child.daemon)
        atexit.unregister(_end_started)
        atexit.register(_end_started)


@contextmanager
def workers_start() -> Iterator[None]:
    """Around the start of workers that have a :class:`LeavesSignals`: hold the taken signals back.

    Until a worker has called it, which takes a moment, it would die of them. Those that come are
    handled at the end, in the worker as in the main process. This is of use in the thread that
    starts the workers, which is the main thread.
    """
    if not _taken or sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _taken)  # workers inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LeavesSignals:
    """A ``worker_init_fn`` that leaves signals to the main process, then does what another does.

    Args:
        worker_init_fn: the one to call; None where there is none.
    """

    def __init__(self, worker_init_fn: WorkerInit | None = None) -> None:
        self.worker_init_fn = worker_init_fn
        self._signals: tuple[int, ...] | None = None  # set in a worker that is no fork

    def __call__(self, worker_id: int) -> None:
        taken = _taken if self._signals is None else self._signals
        for number in taken:
            outlives = _ignore_once if number == signal.SIGTERM else signal.SIG_IGN
            signal.signal(number, outlives)
        if taken and sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)  # see workers_start
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)

    def __reduce__(self) -> tuple[type[LeavesSignals], tuple[WorkerInit | None], object]:
        return type(self), (self.worker_init_fn,), {"_signals": _taken}  # for another process


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _end_started() -> None:
    """At the interpreter's end, ahead of multiprocessing's, which tells each once, and waits."""
    left = _started.intersection(multiprocessing.active_children())
    if not left:
        return
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
    for child in left:
        child.terminate()
    end_at = time.monotonic() + _LAST_WAIT_S
    for child in left:
        child.join(max(0.0, end_at - time.monotonic()))
        child.kill()
