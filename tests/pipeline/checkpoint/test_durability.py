"""Order of writes, flushes and renames."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    Retention,
    load_checkpoint,
    save_checkpoint,
    write_weights,
)
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.run import durable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record flushes and renames with the file's name, in order."""
    made: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def seen_fsync(descriptor: int) -> None:
        fsync(descriptor)
        made.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def seen_rename(source: Any, target: Any) -> None:
        rename(source, target)
        made.append(("rename", os.path.basename(target)))

    def seen_replace(source: Any, target: Any) -> None:
        replace(source, target)
        made.append(("replace", os.path.basename(target)))

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    monkeypatch.setattr(os, "replace", seen_replace)
    return made


def test_files_are_flushed_before_the_rename_and_the_name_after_it(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """The order is files, directory, rename, root; then the save returns."""
    with CheckpointStore(tmp_path / "run") as store:
        del calls[:]
        store.save(1, {"model": {"w": torch.ones(2)}, "trainer": 1}, {"random": [2]})
    place = calls.index(("rename", "step_00000001"))
    kind, folder = calls[place - 1]
    assert kind == "flush"
    assert folder.startswith(".step_00000001.")
    assert sorted(calls[: place - 1]) == [
        ("flush", "manifest.json"),
        ("flush", "model.safetensors"),
        ("flush", "random.rank00000.json"),
        ("flush", "trainer.json"),
    ]
    assert calls[place - 2] == ("flush", "manifest.json")
    assert calls[place + 1 :] == [("flush", "run"), ("replace", "last")]


def test_removal_starts_with_a_flushed_rename(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """The old checkpoint loses its name on the disk before its files are removed."""
    with CheckpointStore(tmp_path / "run", retention=Retention(keep_last=1)) as store:
        store.save(1, {})
        del calls[:]
        store.save(2, {})
    (place,) = [i for i, (kind, name) in enumerate(calls) if name.endswith(".trash")]
    assert calls.index(("rename", "step_00000002")) < place
    assert calls[place + 1] == ("flush", "run")


@pytest.mark.parametrize("past_cache_from", [0, 1 << 62])
@pytest.mark.parametrize("size", [1, 4096, 300_000, 1_000_003])
def test_direct_and_cached_writes_are_equal(
    size: int, past_cache_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files have the same bytes with direct I/O for complete pages and without it."""
    monkeypatch.setattr(durable, "_PAST_CACHE_FROM", past_cache_from)
    tensor = torch.arange(size, dtype=torch.int64)
    save_checkpoint(tmp_path / "one", 1, {"model": {"w": tensor}})
    assert torch.equal(load_checkpoint(tmp_path / "one").parts["model"]["w"], tensor)


def test_write_weights_replaces_a_file(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """The new file is flushed, renamed over the old one, and its name is flushed."""
    path = tmp_path / "folder" / "w.safetensors"
    write_weights(path, {"w": torch.ones(2)}, {"made": "first"})
    del calls[:]
    write_weights(path, {"w": torch.zeros(3)}, {"made": "second"})
    assert [kind for kind, _ in calls] == ["flush", "replace", "flush"]
    assert calls[1:] == [("replace", "w.safetensors"), ("flush", "folder")]
    assert os.listdir(path.parent) == ["w.safetensors"]


def test_refused_weights_leave_the_old_file(tmp_path: Path) -> None:
    """A refused name or tensor leaves the existing file unchanged."""
    path = tmp_path / "w.safetensors"
    write_weights(path, {"w": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(StateError, match="safetensors reserves the name"):
        write_weights(path, {"__metadata__": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]
