"""Durable files and file locks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from robo_orchard_lab.pipeline.run.durable import lock_file


def lock_fork_and_die(path: Path, end: int) -> None:
    """Lock the file, fork a process that lives until ``end`` can be read, and die."""
    lock = lock_file(path)
    assert lock is not None
    is_forked, forked = os.pipe()
    if os.fork() == 0:
        os.write(forked, b"x")  # the handlers of forks have given the lock back
        os.read(end, 1)
        os._exit(0)
    os.read(is_forked, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_lock_is_exclusive_until_release(tmp_path: Path) -> None:
    """A second lock of the same file fails in the same process, and works after the release."""
    lock = lock_file(tmp_path / "lock", "me")
    assert lock is not None
    with pytest.raises(BlockingIOError, match="another holder has the lock"):
        lock_file(tmp_path / "lock", "you")
    assert (tmp_path / "lock").read_text() == "me"
    lock.release()
    assert lock_file(tmp_path / "lock") is not None


def test_forked_process_does_not_keep_the_lock_of_a_dead_one(tmp_path: Path) -> None:
    """A data loader worker that outlives a killed run does not block the next run."""
    read_end, write_end = os.pipe()
    path = tmp_path / "lock"
    process = multiprocessing.get_context("fork").Process(
        target=lock_fork_and_die, args=(path, read_end)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert lock_file(path) is not None
    os.write(write_end, b"x")
    os.close(read_end)
    os.close(write_end)
