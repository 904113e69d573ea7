"""Leftovers of a crash in a root, and their cleanup at the next start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, ReadLimits
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint

HEX = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"trainer": 1})
        store.save(2, {"trainer": 2})
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


CLEAN = [".lock", "last", "step_00000001", "step_00000002"]


def test_unfinished_save_is_removed(root: Path) -> None:
    """A temporary directory, empty, partial or complete, was not acknowledged and is removed."""
    (root / f".step_00000003.{HEX}.tmp").mkdir()
    (root / f".step_00000004.{HEX}.tmp").mkdir()
    (root / f".step_00000004.{HEX}.tmp" / "model.safetensors").write_bytes(b"12")
    os.rename(root / "step_00000002", root / f".step_00000005.{HEX}.tmp")
    (root / f".last.{HEX}.tmp").symlink_to("step_00000009")
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000001"]
    assert os.readlink(root / "last") == "step_00000001"


def test_interrupted_replacement_is_undone(root: Path) -> None:
    """Between the two renames of a replacement, the old checkpoint is the acknowledged one."""
    os.rename(root / "step_00000002", root / f".step_00000002.{HEX}.old")
    CheckpointStore(root).open().close()
    assert names(root) == CLEAN
    assert CheckpointStore(root).load(2).parts["trainer"] == 2


def test_replaced_checkpoint_is_removed(root: Path) -> None:
    """After both renames, the old checkpoint is removed."""
    os.rename(root / "step_00000001", root / f".step_00000002.{HEX}.old")
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000002"]
    assert CheckpointStore(root).load(2).parts["trainer"] == 2


def test_interrupted_removal_is_finished(root: Path) -> None:
    """A removal continues, even with some files already gone."""
    trash = root / f".step_00000001.{HEX}.trash"
    os.rename(root / "step_00000001", trash)
    (trash / "manifest.json").unlink()
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000002"]


def test_links_are_repaired(root: Path) -> None:
    """A crash between a commit and its links is repaired; a dangling link is removed."""
    (root / "last").unlink()
    (root / "last").symlink_to("step_00000001")
    (root / "best").symlink_to("step_00000007")
    CheckpointStore(root).open().close()
    assert names(root) == CLEAN
    assert os.readlink(root / "last") == "step_00000002"


def test_leftover_with_a_reader_is_removed_later(root: Path) -> None:
    """A leftover that a process reads stays until the next start."""
    old = root / f".step_00000002.{HEX}.old"
    os.rename(root / "step_00000001", old)
    with OpenCheckpoint(old, ReadLimits()):
        CheckpointStore(root).open().close()
        assert old.exists()
    CheckpointStore(root).open().close()
    assert not old.exists()


def test_foreign_names_stay(root: Path) -> None:
    """Only names that the store creates are cleaned up."""
    others = [".step_3.tmp", f".other.{HEX}.tmp", f".step_00000003.{HEX}.bak", "step_00000003.tmp"]
    for name in others:
        (root / name).mkdir()
    CheckpointStore(root).open().close()
    assert names(root) == sorted(CLEAN + others)


def test_directory_named_like_a_link_stays(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the directory, and saving continues."""
    (root / "last").unlink()
    (root / "last").mkdir()
    with CheckpointStore(root) as store:
        store.save(3, {"trainer": 3})
        assert store.load("last").parts["trainer"] == 3
    assert (root / "last").is_dir()
    assert "the link" in caplog.text


def test_damaged_checkpoint_is_moved_away(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory without a valid manifest is kept under another name when its step is saved."""
    (root / "step_00000002" / "manifest.json").write_text("{}")
    with CheckpointStore(root) as store:
        store.save(2, {"trainer": "new"})
        assert store.load("last").parts["trainer"] == "new"
    (aside,) = root.glob("step_00000002.kept-*")
    assert (aside / "trainer.json").exists()
    assert "its old contents are kept as step_00000002.kept-" in caplog.text


def test_foreign_file_in_a_checkpoint_stays(root: Path) -> None:
    """Replacing a checkpoint does not lose a file that a user put there."""
    (root / "step_00000002" / "notes.txt").write_text("mine")
    with CheckpointStore(root) as store:
        store.save(2, {"trainer": "new"})
        assert store.load("last").parts["trainer"] == "new"
    (aside,) = root.glob("step_00000002.kept-*")
    assert (aside / "notes.txt").read_text() == "mine"


def test_file_named_like_a_checkpoint_is_refused(root: Path) -> None:
    """A file with the checkpoint's name is an error and is unchanged."""
    (root / "step_00000003").write_text("mine")
    with (
        CheckpointStore(root) as store,
        pytest.raises(FileExistsError, match="not a checkpoint's directory; move it away"),
    ):
        store.save(3, {})
    assert names(root) == sorted([*CLEAN, "step_00000003"])
