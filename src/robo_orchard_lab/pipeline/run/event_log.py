"""events.jsonl: starts, saves, evaluations, skipped updates, warnings and the end of a run."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from robo_orchard_core.utils.logging import visible
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import RetriedWrite, make_folder

EVENTS_FILE = "events.jsonl"
MAX_OF_A_KIND = 1000
"""Events of one kind that a process records; a guard may skip every update of a run."""
_LONGEST_TEXT = 2000
_PACKAGE = "robo_orchard_lab"


class EventLog:
    """Events of a run in progress, appended to ``events.jsonl`` in the run folder.

    A line holds time, kind, step, epoch and text. Lines are not flushed to disk one by one; a
    line that can't be written is lost, which is reported once. Thread-safe.
    """

    def __init__(self, progress: TrainerProgress) -> None:
        self._progress = progress
        self._process = os.getpid()
        self._path: Path | None = None
        self._counts: Counter[str] = Counter()
        self._writes = RetriedWrite("the trainer")
        self._lock = threading.RLock()  # a failed write logs an error, which is an event, too

    @contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Record events in the body, among them the warnings and errors of the package's log."""
        handler = _EventHandler(self)
        logger = logging.getLogger(_PACKAGE)
        self._path, self._counts = folder / EVENTS_FILE, Counter()
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            self._path = None

    def add(self, kind: str, text: str, step: int | None = None) -> None:
        """Append an event; does nothing while no events are recorded.

        Args:
            kind: ``start``, ``resume``, ``plan changed``, ``evaluation``, ``save``,
                ``skipped update``, ``rollback``, ``warning``, ``error`` or ``end``.
            text: description for people, in one line.
            step: number of completed steps; by default of the run, with an open step.
        """
        if os.getpid() != self._process:  # a forked worker has neither the lock nor the counters
            return
        with self._lock:
            self._counts[kind] += 1
            if self._path is None or self._counts[kind] > MAX_OF_A_KIND:
                return
            if self._counts[kind] == MAX_OF_A_KIND:
                text += "; later events of this kind are not recorded"
            event = {
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": kind,
                "step": self._progress.steps_done if step is None else step,
                "epoch": self._progress.epoch_id,
                "text": visible(text)[:_LONGEST_TEXT],
            }
            try:
                _append(self._path, json.dumps(event).encode() + b"\n")
            except OSError as error:
                path, self._path = self._path, None  # the report of the failure is no event
                self._writes.failed(f"writing {path}", error, "the run continues")
                self._path = path
            else:
                self._writes.succeeded(self._path)


def _append(path: Path, line: bytes) -> None:
    names = ("NOFOLLOW", "NONBLOCK", "CLOEXEC", "BINARY")
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | sum(getattr(os, f"O_{n}", 0) for n in names)
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:  # the run folder was removed
        make_folder(path.parent)
        descriptor = os.open(path, flags, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":
            line = b"\n" + line  # a crash cut the last line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


class _EventHandler(logging.Handler):
    """Handler that records warnings and errors as events."""

    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Record the first lines of a message."""
        try:
            kind = "warning" if record.levelno < logging.ERROR else "error"
            self._events.add(kind, record.getMessage())
        except Exception:
            self.handleError(record)
        if logging.lastResort is not None and not self._is_handled_elsewhere(record):
            logging.lastResort.handle(record)  # as without this handler

    def _is_handled_elsewhere(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False
