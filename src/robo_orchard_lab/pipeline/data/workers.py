"""Start of worker processes that ignore the signals of a job.

:class:`IgnoreSignals` keeps workers alive if a signal such as Ctrl-C reaches all processes of a
job: a worker that dies makes the main process fail or hang within a step, when it could have saved
the run.
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

from torch.utils.data import get_worker_info

from robo_orchard_lab.pipeline.data.fetching import Fetcher, ReseededDataset

WorkerInitFn: TypeAlias = Callable[[int], object]

_TERMINATE_TIMEOUT_S = 1.0

_ignored: tuple[int, ...] = ()  # by workers that start now; signal handlers are global, too
_started: set[BaseProcess] = set()  # daemons that started while signals were ignored


@contextmanager
def ignore_signals_in_workers(signals: Iterable[int]) -> Iterator[None]:
    """Ignore signals in workers started in this context, if they have :class:`IgnoreSignals`.

    A second SIGTERM still ends a worker, as a main process does with one that hangs. Workers that
    remain when this process exits, such as persistent ones, are killed.
    """
    global _ignored
    before, _ignored = _ignored, tuple(signals)
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        _ignored = before
        new = set(multiprocessing.active_children()).difference(others)
        _started.update(child for child in new if child.daemon)
        atexit.unregister(_kill_started)
        atexit.register(_kill_started)


@contextmanager
def worker_startup() -> Iterator[None]:
    """Block the ignored signals while workers start, until :class:`IgnoreSignals` is called.

    Must run in the thread that starts the workers, the main thread. Blocked signals are delivered
    at the end.
    """
    if not _ignored or sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ignored)  # workers inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class IgnoreSignals:
    """``worker_init_fn`` that ignores signals, then calls the user's function, if any.

    For the function, ``get_worker_info().dataset`` is the user's dataset.
    """

    def __init__(self, worker_init_fn: WorkerInitFn | None = None) -> None:
        self.worker_init_fn = worker_init_fn
        self._signals: tuple[int, ...] | None = None  # set by unpickling in a spawned worker

    def __call__(self, worker_id: int) -> None:
        ignored = _ignored if self._signals is None else self._signals
        for number in ignored:
            handler = _ignore_once if number == signal.SIGTERM else signal.SIG_IGN
            signal.signal(number, handler)
        if ignored and sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)  # see worker_startup
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (Fetcher, ReseededDataset)):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # WorkerInfo is read-only
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)

    def __reduce__(self) -> tuple[type[IgnoreSignals], tuple[WorkerInitFn | None], object]:
        return type(self), (self.worker_init_fn,), {"_signals": _ignored}


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _kill_started() -> None:
    """Kill workers at exit; multiprocessing would send a single SIGTERM and wait."""
    running = _started.intersection(multiprocessing.active_children())
    if not running:
        return
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a worker dies
    for child in running:
        child.terminate()
    deadline = time.monotonic() + _TERMINATE_TIMEOUT_S
    for child in running:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
