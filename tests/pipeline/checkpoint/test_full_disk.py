"""Saving on a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, save_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make larger writes fail as on a full disk: after a part of the data."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_full_disk_leaves_older_checkpoints(room: int, tmp_path: Path) -> None:
    """The save fails with the system's reason and leaves no files; with free space, the next save
    works."""
    parts = {"model": {"w": torch.ones(1000)}, "trainer": list(range(2000))}
    with CheckpointStore(tmp_path) as store:
        store.save(1, parts)
        before = sorted(os.listdir(tmp_path))
        with (
            largest_file(room),
            pytest.raises(CheckpointError, match=r"step_00000002 failed: .*too large") as raised,
        ):
            store.save(2, parts)
        assert isinstance(raised.value.__cause__, OSError)
        assert sorted(os.listdir(tmp_path)) == before
        assert store.load("last").info.step == 1
        store.save(2, parts)
        assert store.load("last").info.step == 2


def test_save_checkpoint_cleans_up_on_a_full_disk(tmp_path: Path) -> None:
    """save_checkpoint removes its partial files."""
    with largest_file(100), pytest.raises(CheckpointError, match="too large"):
        save_checkpoint(tmp_path / "one", 1, {"model": {"w": torch.ones(1000)}})
    assert os.listdir(tmp_path) == []


def test_failed_replacement_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The old checkpoint of the step stays until the new one is complete."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"trainer": "old"})
        with largest_file(1000), pytest.raises(CheckpointError, match="too large"):
            store.save(1, {"model": {"w": torch.ones(1000)}})
        assert store.load(1).parts["trainer"] == "old"


FILL = """
import os, sys, torch
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Retention
from robo_orchard_lab.pipeline.errors import CheckpointError
root = sys.argv[1]
parts = lambda n: {"model": {"w": torch.full((75_000,), float(n))}, "trainer": n}
with CheckpointStore(root) as store:
    step = 0
    try:
        while True:
            store.save(step + 1, parts(step + 1))
            step += 1
    except CheckpointError as error:
        assert "No space left on device" in str(error), error
    assert step >= 2, step
    assert not [name for name in os.listdir(root) if name.startswith(".step")]
    assert store.load("last").parts["trainer"] == step
    assert all(item.problem is None for item in store.verify())
with CheckpointStore(root, retention=Retention(keep_last=1)) as store:
    store.prune()
    store.save(step + 1, parts(step + 1))
    assert store.load("last").parts["trainer"] == step + 1
print("recovered")
"""


def test_full_file_system(tmp_path: Path) -> None:
    """Saving to a full tmpfs of 1 MiB fails with the file's name, and recovers."""
    command = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{FILL}' {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "recovered\n"
