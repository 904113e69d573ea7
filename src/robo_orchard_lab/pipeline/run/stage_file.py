"""stage.json: current stage and counters of a run in progress, for ``watch``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Literal, TypeAlias

from robo_orchard_lab.pipeline.progress import TrainerProgress

STAGE_FILE = "stage.json"
Stage: TypeAlias = Literal["starting", "training", "evaluating", "saving"]

_EVERY_S = 1.0
_LONGEST_DETAIL = 100
_BYTES = 1024  # of the file, so that each write covers the one before


class StageFile:
    """Writer of ``stage.json`` in the run folder; the file is removed when the run ends.

    The file is written when the stage changes, and at commit points with requests at most once a
    second; a step writes nothing. It is written in place, with one call and no flush: replacing a
    file costs a hundred times as much. A reader that sees a torn file reads again. A write that
    fails is skipped, since the file matters only while the run is in progress.
    """

    def __init__(self, progress: TrainerProgress) -> None:
        self._progress = progress
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._now = ("", "")
        self._since = ""
        self._due_at = self._loop_began_at = 0.0
        self._first_step = 0
        self._find_limits: Callable[[], dict[str, int | None]] = dict

    @contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Record stages in the body, the first of them ``starting``."""
        self._path, self._now, self._find_limits = folder / STAGE_FILE, ("", ""), dict
        with suppress(OSError):
            self._path.unlink()  # of a killed process
        self.enter("starting")
        try:
            yield
        finally:
            with suppress(OSError):
                self._path.unlink()
            self._close()
            self._path = None

    def begin_loop(self, find_limits: Callable[[], dict[str, int | None]]) -> None:
        """Record ``training``; the pace of the run is measured from here.

        Args:
            find_limits: returns limits of the run by name, to record; called for each write.
        """
        self._find_limits = find_limits
        self._first_step, self._loop_began_at = self._progress.global_step_id, monotonic()
        self.enter("training")

    def enter(self, stage: Stage, detail: str = "") -> None:
        """Record a stage, or new counters of the same stage."""
        if self._path is None or ((stage, detail) == self._now and monotonic() < self._due_at):
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        if (stage, detail) != self._now:
            self._now, self._since = (stage, detail), at
        document = {
            "version": 1,
            "stage": stage,
            "detail": detail[:_LONGEST_DETAIL],
            "since": self._since,
            "at": at,
            "step": self._progress.global_step_id,
            "epoch": self._progress.epoch_id,
            "first_step": self._first_step,
            "loop_seconds": round(monotonic() - self._loop_began_at, 3),
            **self._find_limits(),
        }
        with suppress(OSError):  # events.jsonl and run_state.json report a full disk
            self._write(self._path, json.dumps(document).encode())
        self._due_at = monotonic() + _EVERY_S

    def _write(self, path: Path, data: bytes) -> None:
        if self._descriptor is None or not path.exists():  # the run folder was removed
            self._close()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # follows no link
            self._descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, data.ljust(_BYTES - 1) + b"\n")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
