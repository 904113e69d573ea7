"""Kills at each file system call: acknowledged saves survive."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dies_at_a_call
from dies_at_a_call import RETENTION, contents
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.testing.resume_worker import run_processes

BEGUN = [(1, 1), (2, 2)]
"""Saves before a process starts: step and mark."""
SAVES = [(3, 3), (3, 4), (2, 5)]
"""Saves of the process: a new step, an existing one, and an older one, which removes another."""


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Root with the first saves."""
    lines = save(tmp_path / "begun", BEGUN)
    assert lines[:-1] == ["saved 1 1", "saved 2 2"]
    return tmp_path / "begun"


def save(root: Path, saves: list[tuple[int, int]], die_at: int | None = None) -> list[str]:
    """Save in another process; return its output, up to a kill."""
    output = root.parent / "output"
    order: dict[str, Any] = {"root": str(root), "saves": saves, "die_at": die_at}
    [code] = run_processes(dies_at_a_call.run, [order], [output], timeout_s=60)
    assert code == (0 if die_at is None else -signal.SIGKILL), output.read_text()
    return output.read_text().splitlines()


def copy_of(root: Path) -> Path:
    copy = root.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy, symlinks=True)
    return copy


def calls_of(lines: list[str]) -> int:
    """Return the number of file system calls of a process that was not killed."""
    return int(lines[-1].removeprefix("calls "))


def check_after(root: Path, lines: list[str]) -> None:
    """Check that no acknowledged save is lost and that the next start cleans up."""
    acknowledged = [(int(line.split()[1]), int(line.split()[2])) for line in lines]
    possible = [*BEGUN, *SAVES]
    newest = possible.index((acknowledged or BEGUN)[-1])
    assert (root / "last").is_symlink(), "the link always exists"
    assert CheckpointStore(root).load_newest() is not None, "some checkpoint always loads"
    with CheckpointStore(root, retention=RETENTION) as store:
        found = store.load_newest()
        assert found is not None
        assert found.skipped == ()
        trainer = found.parts["trainer"]
        # The next save may be complete without having been reported.
        assert possible.index((trainer["step"], trainer["mark"])) in (newest, newest + 1)
        expected = contents(**trainer)
        assert torch.equal(found.parts["model"]["weight"], expected["model"]["weight"])
        assert all(verified.problem is None for verified in store.verify())
        assert os.readlink(root / "last") == found.info.path.name
        assert os.readlink(root / "best") == "step_00000001"
        marks = [store.load(info.path).parts["trainer"]["mark"] for info in store.list()]
    by_step = dict(possible[: possible.index((trainer["step"], trainer["mark"])) + 1])
    order = sorted(by_step.values())
    assert {1, *order[-2:]} <= set(marks), "the best one and the last two are kept"
    names = set(os.listdir(root)) - {".lock", "last", "best"}
    assert all(name.startswith("step_") for name in names), names


def test_kill_at_any_call_loses_no_acknowledged_save(begun: Path) -> None:
    """A kill before any open, rename or removal loses no acknowledged save."""
    calls = calls_of(save(copy_of(begun), SAVES))
    assert calls > 40
    for call in range(calls):
        root = copy_of(begun)
        lines = save(root, SAVES, die_at=call)
        check_after(root, lines)


def recoveries(begun: Path, every: int = 1) -> Iterator[tuple[Path, list[str], int]]:
    """Yield a root after a kill, the process's output, and the number of calls of a recovery."""
    calls = calls_of(save(copy_of(begun), SAVES))
    for call in range(0, calls, every):
        root = copy_of(begun)
        lines = save(root, SAVES, die_at=call)
        left = root.rename(begun.with_name(f"left-{call}"))
        yield left, lines, calls_of(save(copy_of(left), []))


def kill_again(left: Path, lines: list[str], call: int) -> None:
    root = copy_of(left)
    save(root, [], die_at=call)
    check_after(root, lines)


def test_kill_during_recovery_loses_no_acknowledged_save(begun: Path) -> None:
    """The start that cleans up may be killed as well."""
    chance = random.Random(0)
    for left, lines, calls in recoveries(begun, every=4):
        kill_again(left, lines, chance.randrange(calls))


@pytest.mark.slow
def test_kill_at_any_call_of_any_recovery(begun: Path) -> None:
    """A kill at every call of the cleanup, for each kind of leftover, loses nothing."""
    for left, lines, calls in recoveries(begun):
        for call in range(calls):
            kill_again(left, lines, call)
