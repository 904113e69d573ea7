"""A process that saves into a store and is killed: at a call of the file system, or from outside.

It tells each save that was acknowledged on its standard output.
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
"""What Python tells ahead of doing it: opening a file, and changing the names in a folder."""
RETENTION = Retention(keep_last=2, keep_best=1, monitor="error", mode="min")


class DieAt:
    """Kills this very process ahead of its n-th call of the file system, counted from 0."""

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
    """Save each of ``saves``, pairs of a step and what is to tell it from another of that step.

    Killed ahead of the call number ``die_at`` since the store began to open, if that is given. At
    the end it tells how many calls were made.
    """
    store = CheckpointStore(order["root"], retention=RETENTION)
    death = DieAt(order["die_at"])
    with store:
        for step, mark in order["saves"]:
            parts = contents(step, mark)
            store.save(step, parts, metrics={"error": mark})
            tell(f"saved {step} {mark}")
    tell(f"calls {death.made}")


def contents(step: int, mark: int) -> dict[str, Any]:
    """Tensors of some size and a tree, all of which tell the step and the mark."""
    weights = torch.full((50, 50), float(step * 1000 + mark))
    return {"model": {"weight": weights}, "trainer": {"step": step, "mark": mark}}


def tell(line: str) -> None:
    """In one write, which is there also after a SIGKILL."""
    os.write(1, f"{line}\n".encode())
