"""Single faults in each file of a checkpoint."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    ReadLimits,
    load_checkpoint,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.errors import CheckpointError

FILES = [
    "manifest.json",
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "random.rank00000.json",
    "random.rank00000.safetensors",
    "trainer.json",
]


def fill(store: CheckpointStore, step: int) -> None:
    store.save(
        step,
        {
            "model": {"w": torch.full((3,), float(step)), "b": torch.tensor([True, False])},
            "optimizer": {"w": {"step": torch.tensor(float(step))}, "lr": 0.1 * step},
            "trainer": {"step": step},
        },
        {"random": {"torch": torch.full((8,), step, dtype=torch.uint8), "python": step}},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with CheckpointStore(tmp_path / "run") as store:
        fill(store, 1)
        fill(store, 2)
    assert sorted(os.listdir(tmp_path / "run" / "step_00000002")) == FILES
    return tmp_path / "run"


def check_is_refused(root: Path, name: str) -> None:
    """Check that the damaged newest checkpoint is an error that names the file, and that the older
    one is the newest that verifies."""
    store = CheckpointStore(root)
    for which in (2, "last", root / "step_00000002"):
        with pytest.raises(CheckpointError, match=rf"step_00000002/{name}"):
            store.load(which)
    found = store.load_newest()
    assert found is not None
    assert found.info.step == found.parts["trainer"]["step"] == 1
    ((path, why),) = found.skipped
    assert path.name == "step_00000002"
    assert f"step_00000002/{name}" in why
    verified = {item.path.name: item.problem for item in store.verify()}
    assert verified["step_00000001"] is None
    assert f"step_00000002/{name}" in str(verified["step_00000002"])


def other(path: Path) -> Path:
    """Return the same file of the other checkpoint."""
    return path.parent.parent / "step_00000001" / path.name


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def swap(path: Path) -> None:
    mine, theirs = path.read_bytes(), other(path).read_bytes()
    assert len(mine) == len(theirs) or path.name == "manifest.json"
    assert mine != theirs
    path.write_bytes(theirs)


def link_to_a_copy(path: Path) -> None:
    copy = path.parent.parent / "copy"
    shutil.move(path, copy)
    path.symlink_to(copy)


def link_to_a_neighbour(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS = [
    Path.unlink,
    empty,
    cut_short,
    grow,
    link_to_a_copy,
    link_to_a_neighbour,
    directory_instead,
    pipe_instead,
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faulty_file_is_named(fault: Callable[[Path], None], name: str, root: Path) -> None:
    """Every fault is found and named, and the older checkpoint is loaded."""
    fault(root / "step_00000002" / name)
    check_is_refused(root, name)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_file_of_another_checkpoint_is_refused(name: str, root: Path) -> None:
    """A file of the same name and size from another checkpoint is detected."""
    swap(root / "step_00000002" / name)
    check_is_refused(root, name)


def test_manifest_of_another_checkpoint_is_refused(root: Path) -> None:
    """A manifest is valid only in a directory that is named for its step."""
    swap(root / "step_00000002" / "manifest.json")
    found = CheckpointStore(root).load_newest()
    assert found is not None
    assert found.info.path.name == "step_00000001"
    assert "step_00000002 is the checkpoint of step 1" in found.skipped[0][1]
    with pytest.raises(CheckpointError, match="step_00000002 is the checkpoint of step 1"):
        CheckpointStore(root).load("last")


def test_any_changed_bit_is_detected(root: Path) -> None:
    """One flipped bit in any byte of any file is detected."""
    chosen = random.Random(0)
    for name in FILES:
        path = root / "step_00000002" / name
        text = path.read_bytes()
        for place in range(len(text)):
            changed = bytearray(text)
            changed[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=f"step_00000002/{name}"):
                load_checkpoint(path.parent)
        path.write_bytes(text)
    assert load_checkpoint(root / "step_00000002").info.step == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize("name", [*FILES, ""])
def test_file_of_another_owner_is_refused(name: str, root: Path) -> None:
    """A file of another user is read only with any_owner=True."""
    os.chown(root / "step_00000002" / name, 12345, -1)
    found = CheckpointStore(root).load_newest()
    assert found is not None
    assert found.info.step == 1
    assert f"step_00000002{'/' * bool(name)}{name} belongs to user 12345" in found.skipped[0][1]
    allowed = CheckpointStore(root, limits=ReadLimits(any_owner=True))
    assert allowed.load("last").info.step == 2


def test_link_to_a_checkpoint_is_not_a_checkpoint(root: Path) -> None:
    """A link with a checkpoint's name in the root is skipped."""
    shutil.move(root / "step_00000002", root / "moved")
    (root / "step_00000002").symlink_to("moved")
    found = CheckpointStore(root).load_newest()
    assert found is not None
    assert found.info.step == 1
    assert "is a link" in found.skipped[0][1]


def test_error_lists_all_problems_if_nothing_verifies(root: Path) -> None:
    """The error names the problem of each checkpoint."""
    for step in (1, 2):
        (root / f"step_{step:08d}" / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* verifies") as raised:
        CheckpointStore(root).load_newest()
    for step in (1, 2):
        assert f"step_{step:08d}/trainer.json can't be read: No such file" in str(raised.value)


def test_directory_without_a_manifest_is_skipped(root: Path) -> None:
    """A directory with a checkpoint's name is skipped, with the reason."""
    (root / "step_00000003").mkdir()
    found = CheckpointStore(root).load_newest()
    assert found is not None
    assert found.info.step == 2
    assert "manifest.json can't be read: No such file" in found.skipped[0][1]


LIMITS = [
    (ReadLimits(max_files=5), "lists 6 files; at most 5 are read"),
    (ReadLimits(max_manifest_bytes=100), "bytes; at most 100 are read"),
    (ReadLimits(max_json_bytes=5), "bytes; at most 5 are read"),
    (ReadLimits(max_json_depth=1), "nested deeper than 1"),
    (ReadLimits(max_header_bytes=20), "its header has .* bytes; at most 20 are read"),
    (ReadLimits(max_tensors=1), "it has 2 tensors; at most 1 are read"),
    (ReadLimits(max_total_bytes=100), "bytes to read; at most 100 are"),
]


@pytest.mark.parametrize(("limits", "message"), LIMITS)
def test_checkpoint_beyond_the_limits_is_refused(
    limits: ReadLimits, message: str, root: Path
) -> None:
    """Each limit has an error that states the excess."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(root / "step_00000002", limits=limits)


@pytest.mark.parametrize("limits", [limits for limits, _ in LIMITS[:-1]])
def test_limits_apply_to_saving(limits: ReadLimits, tmp_path: Path) -> None:
    """A store refuses to save a checkpoint that it could not load."""
    with (
        CheckpointStore(tmp_path, limits=limits) as store,
        pytest.raises(ValueError, match=r"would|nested deeper"),
    ):
        fill(store, 1)
    assert os.listdir(tmp_path) == [".lock"]


def test_huge_file_is_refused_before_reading(tmp_path: Path) -> None:
    """A file of another size than in the manifest is not read."""
    save_checkpoint(tmp_path / "one", 0, {"model": {"w": torch.ones(1)}})
    path = tmp_path / "one" / "model.safetensors"
    os.truncate(path, 1 << 43)
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected \d+ bytes, found"):
        load_checkpoint(tmp_path / "one")
