"""Process that saves to a store and kills itself at a file system call.

Standard output lists the acknowledged saves.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Retention

CALLS = frozenset(
    f"os.{name}" for name in ("mkdir", "remove", "rename", "rmdir", "symlink", "truncate")
) | {"open"}
"""Audit events of Python before it opens a file or changes the names in a directory."""
RETENTION = Retention(keep_last=2, keep_best=1, monitor="error", mode="min")


class DieAt:
    """Hook that kills this process before its n-th file system call, counted from 0."""

    def __init__(self, call: int | None) -> None:
        self.made = 0
        self._call = call
        sys.addaudithook(self._count)

    def _count(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CALLS:
            if self.made == self._call:
                os.kill(os.getpid(), signal.SIGKILL)
            self.made += 1


def run(order: dict[str, Any]) -> None:
    """Save each of ``saves``: pairs of a step and a mark that identifies the save.

    Counting starts when the store opens; call ``die_at`` kills the process. Otherwise the last line
    of output is the number of calls.
    """
    store = CheckpointStore(order["root"], retention=RETENTION)
    death = DieAt(order["die_at"])
    with store:
        for step, mark in order["saves"]:
            parts = contents(step, mark)
            store.save(step, parts, metrics={"error": mark})
            report(f"saved {step} {mark}")
    report(f"calls {death.made}")


def contents(step: int, mark: int) -> dict[str, Any]:
    """Return parts whose tensors and tree depend on the step and the mark."""
    weights = torch.full((50, 50), float(step * 1000 + mark))
    return {"model": {"weight": weights}, "trainer": {"step": step, "mark": mark}}


def report(line: str) -> None:
    """Print in one write, which survives a SIGKILL."""
    os.write(1, f"{line}\n".encode())
