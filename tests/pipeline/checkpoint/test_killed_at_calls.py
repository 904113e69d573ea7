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
"""What is saved when a process begins: the step, and a mark."""
SAVES = [(3, 3), (3, 4), (2, 5)]
"""What it saves: a new step, one that is there, and an older one, which removes another."""


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A root with the first saves in it."""
    told = save(tmp_path / "begun", BEGUN)
    assert told[:-1] == ["saved 1 1", "saved 2 2"]
    return tmp_path / "begun"


def save(root: Path, saves: list[tuple[int, int]], die_at: int | None = None) -> list[str]:
    """What a process told that saved into a root, until it was killed."""
    output = root.parent / "told"
    order: dict[str, Any] = {"root": str(root), "saves": saves, "die_at": die_at}
    [code] = run_processes(dies_at_a_call.run, [order], [output], timeout_s=60)
    assert code == (0 if die_at is None else -signal.SIGKILL), output.read_text()
    return output.read_text().splitlines()


def copy_of(root: Path) -> Path:
    copy = root.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy, symlinks=True)
    return copy


def calls_of(told: list[str]) -> int:
    """How many calls of the file system a process made that was not killed."""
    return int(told[-1].removeprefix("calls "))


def check_after(root: Path, told: list[str]) -> None:
    """Nothing that was acknowledged is lost, and the next start leaves nothing lying about."""
    acknowledged = [(int(line.split()[1]), int(line.split()[2])) for line in told]
    possible = [*BEGUN, *SAVES]
    newest = possible.index((acknowledged or BEGUN)[-1])
    assert (root / "last").is_symlink(), "a link is there at any time"
    assert CheckpointStore(root).load_newest() is not None, "so is something to read"
    with CheckpointStore(root, retention=RETENTION) as store:
        found = store.load_newest()
        assert found is not None
        assert found.skipped == ()
        trainer = found.parts["trainer"]
        # The save after may have come so far as to be there, but was not told of any more.
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
        told = save(root, SAVES, die_at=call)
        check_after(root, told)


def recoveries(begun: Path, every: int = 1) -> Iterator[tuple[Path, list[str], int]]:
    """A root as a kill leaves it, what was acknowledged, and how many calls it takes to mend."""
    calls = calls_of(save(copy_of(begun), SAVES))
    for call in range(0, calls, every):
        root = copy_of(begun)
        told = save(root, SAVES, die_at=call)
        left = root.rename(begun.with_name(f"left-{call}"))
        yield left, told, calls_of(save(copy_of(left), []))


def killed_again(left: Path, told: list[str], call: int) -> None:
    root = copy_of(left)
    save(root, [], die_at=call)
    check_after(root, told)


def test_kill_during_recovery_loses_no_acknowledged_save(begun: Path) -> None:
    """The start that cleans up may be killed as well."""
    chance = random.Random(0)
    for left, told, calls in recoveries(begun, every=4):
        killed_again(left, told, chance.randrange(calls))


@pytest.mark.slow
def test_kill_at_any_call_of_any_recovery(begun: Path) -> None:
    """A kill at every call of the cleanup, for each kind of leftover, loses nothing."""
    for left, told, calls in recoveries(begun):
        for call in range(calls):
            killed_again(left, told, call)
