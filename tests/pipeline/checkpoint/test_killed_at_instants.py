"""Processes that are killed during saves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from launching import SCRIPTS
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.checkpoint.manifest import step_from_name

SCRIPT = SCRIPTS / "save_until_killed.py"
LONGEST_LIFE_S = 0.12
KEPT = 3
"""Number of checkpoints that the script keeps."""


@pytest.fixture
def saver() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]  # it is a pipe


def words(stream: IO[str] | None) -> list[str]:
    assert stream is not None
    return stream.readline().split()


def saved_before_kill(
    saver: subprocess.Popen[str], root: Path, start: int, life_s: float, *, from_first: bool
) -> int:
    """Return the number of the last acknowledged save, or ``start`` without one.

    The process lives ``life_s`` seconds from its start, or from its first save.
    """
    assert saver.stdin is not None
    saver.stdin.write(f"go {root} {start}\n")
    saver.stdin.flush()
    kind, pid = words(saver.stdout)
    assert kind == "pid"
    last = start
    if from_first:
        last = int(words(saver.stdout)[1])
    time.sleep(life_s)
    os.kill(int(pid), signal.SIGKILL)
    while (line := words(saver.stdout)) != ["ended"]:
        assert line[0] == "saved", line
        last = int(line[1])
    return last


def check_kills(saver: subprocess.Popen[str], root: Path, kills: int) -> None:
    chosen = random.Random(kills)
    newest, leftovers, kept = 0, 0, KEPT
    for kill in range(kills):
        acknowledged = saved_before_kill(
            *(saver, root, newest, chosen.uniform(0, LONGEST_LIFE_S)), from_first=kill % 2 == 1
        )
        leftovers += (
            any(name.startswith(".step") for name in os.listdir(root)) if root.exists() else 0
        )
        store = CheckpointStore(root)
        with store:
            names = set(os.listdir(root)) - {".lock", "last"}
            assert all(step_from_name(name) is not None for name in names), names
            found = store.load_newest()
            assert all(item.problem is None for item in store.verify())
            # A kill between a save's commit and its pruning leaves one more than there were.
            assert len(names) <= max(kept, KEPT) + 1
            kept = len(names)
        if found is None:
            assert acknowledged == 0
            continue
        newest = found.parts["trainer"]
        assert found.skipped == ()
        assert newest in (acknowledged, acknowledged + 1)  # its successor was not reported in time
        assert found.rank_parts["random"] == [newest]
        assert found.parts["model"]["a"].eq(newest).all()
        assert os.readlink(root / "last") == found.info.path.name
    assert newest >= kills // 2
    assert leftovers > 0


def test_no_acknowledged_save_is_lost(saver: subprocess.Popen[str], tmp_path: Path) -> None:
    """After 20 kills at random times, the newest checkpoint is complete, and is the last
    acknowledged     one or its successor; an interrupted save leaves nothing."""
    check_kills(saver, tmp_path / "run", 20)


@pytest.mark.slow
def test_no_acknowledged_save_is_lost_in_many_kills(
    saver: subprocess.Popen[str], tmp_path: Path
) -> None:
    """300 kills lose no acknowledged save."""
    check_kills(saver, tmp_path / "run", 300)
