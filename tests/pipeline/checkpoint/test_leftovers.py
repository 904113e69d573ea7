"""What a crash leaves in a root, and what the next start does about it."""

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


def test_an_unfinished_save_is_removed(root: Path) -> None:
    """A temporary folder, empty, half written or whole, was not acknowledged and goes."""
    (root / f".step_00000003.{HEX}.tmp").mkdir()
    (root / f".step_00000004.{HEX}.tmp").mkdir()
    (root / f".step_00000004.{HEX}.tmp" / "model.safetensors").write_bytes(b"12")
    os.rename(root / "step_00000002", root / f".step_00000005.{HEX}.tmp")
    (root / f".last.{HEX}.tmp").symlink_to("step_00000009")
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000001"]
    assert os.readlink(root / "last") == "step_00000001"


def test_what_was_being_replaced_comes_back(root: Path) -> None:
    """Between the two renames of a replacement the old checkpoint is the acknowledged one."""
    os.rename(root / "step_00000002", root / f".step_00000002.{HEX}.old")
    CheckpointStore(root).open().close()
    assert names(root) == CLEAN
    assert CheckpointStore(root).load(2).parts["trainer"] == 2


def test_what_was_replaced_goes(root: Path) -> None:
    """After both renames the old one is not needed."""
    os.rename(root / "step_00000001", root / f".step_00000002.{HEX}.old")
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000002"]
    assert CheckpointStore(root).load(2).parts["trainer"] == 2


def test_what_was_being_removed_goes(root: Path) -> None:
    """A removal that was begun is finished, also half way through its files."""
    trash = root / f".step_00000001.{HEX}.trash"
    os.rename(root / "step_00000001", trash)
    (trash / "manifest.json").unlink()
    CheckpointStore(root).open().close()
    assert names(root) == [".lock", "last", "step_00000002"]


def test_links_are_mended(root: Path) -> None:
    """A crash between a commit and its links is made good; a link to nothing is removed."""
    (root / "last").unlink()
    (root / "last").symlink_to("step_00000001")
    (root / "best").symlink_to("step_00000007")
    CheckpointStore(root).open().close()
    assert names(root) == CLEAN
    assert os.readlink(root / "last") == "step_00000002"


def test_what_a_reader_holds_goes_later(root: Path) -> None:
    """A leftover that is being read stays until the next start."""
    old = root / f".step_00000002.{HEX}.old"
    os.rename(root / "step_00000001", old)
    with OpenCheckpoint(old, ReadLimits()):
        CheckpointStore(root).open().close()
        assert old.exists()
    CheckpointStore(root).open().close()
    assert not old.exists()


def test_names_of_others_stay(root: Path) -> None:
    """Only names that the store itself makes are cleaned up."""
    others = [".step_3.tmp", f".other.{HEX}.tmp", f".step_00000003.{HEX}.bak", "step_00000003.tmp"]
    for name in others:
        (root / name).mkdir()
    CheckpointStore(root).open().close()
    assert names(root) == sorted(CLEAN + others)


def test_a_folder_in_the_place_of_a_link_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of, and saving goes on."""
    (root / "last").unlink()
    (root / "last").mkdir()
    with CheckpointStore(root) as store:
        store.save(3, {"trainer": 3})
        assert store.load("last").parts["trainer"] == 3
    assert (root / "last").is_dir()
    assert "the link" in caplog.text


def test_a_damaged_checkpoint_makes_way(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A step that can't be told for a checkpoint is moved aside when it is saved again."""
    (root / "step_00000002" / "manifest.json").write_text("{}")
    with CheckpointStore(root) as store:
        store.save(2, {"trainer": "new"})
        assert store.load("last").parts["trainer"] == "new"
    (aside,) = root.glob("step_00000002.kept-*")
    assert (aside / "trainer.json").exists()
    assert "what was there stays as step_00000002.kept-" in caplog.text


def test_someones_file_in_a_checkpoint_stays(root: Path) -> None:
    """Where a step is saved again, what was put beside its files is not lost."""
    (root / "step_00000002" / "notes.txt").write_text("mine")
    with CheckpointStore(root) as store:
        store.save(2, {"trainer": "new"})
        assert store.load("last").parts["trainer"] == "new"
    (aside,) = root.glob("step_00000002.kept-*")
    assert (aside / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_a_checkpoint_is_refused(root: Path) -> None:
    """What is no folder is left as it is, and so is everything else."""
    (root / "step_00000003").write_text("mine")
    with (
        CheckpointStore(root) as store,
        pytest.raises(FileExistsError, match="not a checkpoint's folder; move it away"),
    ):
        store.save(3, {})
    assert names(root) == sorted([*CLEAN, "step_00000003"])
