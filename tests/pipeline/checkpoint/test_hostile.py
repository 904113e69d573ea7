"""Checkpoints crafted to do harm."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psutil  # type: ignore[import-untyped]  # carries no annotations
import pytest
import torch

from hostile_checkpoints import LIMITS, WAYS, Made, make_hostile
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    ReadLimits,
    load_checkpoint,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import verify_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.progress import MAX_COUNT

# Additional memory for reading: the limits' 16 MiB of tensors, and 25 times their 1 MiB of JSON.
ROOM_BYTES = 256 << 20
SLOWEST_S = 5.0


@pytest.fixture
def good(tmp_path: Path) -> Made:
    tensors = {
        "w": torch.ones(3, 4),
        "b": torch.zeros(5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
    }
    save_checkpoint(
        tmp_path / "good",
        3,
        {"model": tensors, "optimizer": {"lr": 0.1, "state": {0: tensors["w"]}}, "trainer": [1]},
        {"random": {"stream": torch.arange(8), "place": 3}},
        metrics={"loss": 0.5},
        metadata={"versions": {"torch": "2"}},
    )
    assert load_checkpoint(tmp_path / "good", limits=LIMITS).info.step == 3
    return Made.read(tmp_path / "good")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit additional memory; more is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal_of(path: Path) -> str | None:
    """Return the error's text, or None if the checkpoint loads."""
    try:
        load_checkpoint(path, limits=LIMITS)
    except CheckpointError as error:
        return str(error)
    return None


def check_all_are_refused(good: Made, folder: Path, numbers: range) -> None:
    """Check that each is soon a CheckpointError with the path, and that nothing is written."""
    arena = folder / "arena"
    arena.mkdir()
    (arena / "secret").write_text("12345")
    before = sorted(os.listdir(folder))
    refused: Counter[str] = Counter()
    for number in numbers:
        way, made = make_hostile(good, number)
        path = arena / "step_00000003"
        made.write(path)
        names = sorted(os.listdir(path))
        began_at = monotonic()
        message = refusal_of(path)
        assert message is not None, f"number {number} was loaded: {way}"
        assert str(path) in message, (number, way)
        assert len(message) < 2000, (number, way)
        if number % 4 == 0:
            assert verify_checkpoint(path, LIMITS).problem is not None, (number, way)
        assert monotonic() - began_at < SLOWEST_S, (number, way)
        assert sorted(os.listdir(path)) == names
        assert sorted(os.listdir(arena)) == ["secret", "step_00000003"]
        refused[way] += 1
        shutil.rmtree(path)
    assert (arena / "secret").read_text() == "12345"
    assert sorted(os.listdir(folder)) == before
    assert len(refused) == len(WAYS)


def test_hostile_checkpoints_are_refused(good: Made, tmp_path: Path, little_memory: None) -> None:
    """None of 1,700 defective checkpoints loads, crashes, is slow or needs much memory."""
    check_all_are_refused(good, tmp_path, range(1_700))


@pytest.mark.slow
def test_ten_thousand_hostile_checkpoints_are_refused(
    good: Made, tmp_path: Path, little_memory: None
) -> None:
    """10,000 other hostile checkpoints are refused as well."""
    check_all_are_refused(good, tmp_path, range(10_000, 20_000))


# --- counters --------------------------------------------------------------------------------


def put_hostile(root: Path, **fields: int) -> Path:
    """Write a signed checkpoint with these fields of the manifest into a store's root."""
    save_checkpoint(root / "made", fields.get("step", 7), {"model": {"w": torch.ones(2)}})
    made = Made.read(root / "made")
    shutil.rmtree(root / "made")
    made.manifest.update(fields)
    path = root / f"step_{fields.get('step', 7):08d}"
    made.write(path)
    return path


@pytest.mark.parametrize("serial", [2**63 - 1, 2**63, MAX_COUNT + 1])
def test_absurd_serial_leaves_later_saves_readable(serial: int, tmp_path: Path) -> None:
    """A checkpoint with an absurd serial is skipped, and saves after it are found and loaded."""
    path = put_hostile(tmp_path, serial=serial)
    for _ in range(2):
        with CheckpointStore(tmp_path) as store:
            for step in (8, 9):
                store.save(step, {"model": {"w": torch.full((2,), step)}})
            newest = store.load_newest()
            assert newest is not None
            assert newest.info.step == 9
            assert store.load("last").info.step == 9
            assert [path for path, _ in newest.skipped] == [path]
            assert verify_checkpoint(path, store.limits).problem is not None


@pytest.mark.parametrize("serial", [MAX_COUNT, MAX_COUNT - 1])
def test_serial_without_a_successor_is_refused_at_the_start(serial: int, tmp_path: Path) -> None:
    """A root whose newest serial leaves no number for saves can't be opened; the error says why."""
    path = put_hostile(tmp_path, serial=serial)
    message = f"{path} claims to be save {serial} .* move it to another directory"
    with pytest.raises(CheckpointError, match=message), CheckpointStore(tmp_path):
        pass


def test_step_without_a_successor_is_not_saved(tmp_path: Path) -> None:
    """A step that could not be read again is refused, and a directory of that name is ignored."""
    put_hostile(tmp_path, step=MAX_COUNT)
    (tmp_path / "step_9999999999999999999").mkdir()
    with CheckpointStore(tmp_path) as store:
        assert [info.step for info in store.list()] == [MAX_COUNT]
        with pytest.raises(StateError, match="the largest is"):
            store.save(MAX_COUNT + 1, {"model": {"w": torch.ones(2)}})
        store.save(9, {"model": {"w": torch.ones(2)}})
        assert store.load("last").info.step == 9


# --- memory ----------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, ReadLimits
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import verify_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError
from pathlib import Path
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        assert verify_checkpoint(Path(path), ReadLimits()).problem is not None, path
        print(error)
print(peak() - before)
"""


def test_hostile_checkpoints_need_little_memory(good: Made, tmp_path: Path) -> None:
    """Sizes in sum, values, tensors and sparse files are refused unread, within 150 MiB."""
    values, parts, tensors = (Made({**good.manifest}, {**good.files}) for _ in range(3))
    for made in (values, parts, tensors):
        made.manifest["files"] = {**made.manifest["files"]}
    values.files["trainer.json"] = b"[" + b"[]," * 3_000_000 + b"0]"
    values.sign("trainer.json")
    for number in range(6):
        parts.files[f"part{number}.json"] = b'"' + b"x" * (6 << 20) + b'"'
        parts.sign(f"part{number}.json")
    for number in range(2):
        count = ReadLimits().max_tensors * 2 // 3
        entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        header = "{" + ",".join(f'"{n}":{entry}' for n in range(count)) + "}"
        text = header.encode() + b" " * (-(8 + len(header)) % 64)
        tensors.files[f"part{number}.safetensors"] = len(text).to_bytes(8, "little") + text
        tensors.sign(f"part{number}.safetensors")
    paths = [tmp_path / name for name in ("values", "parts", "tensors", "sparse")]
    for made, path in zip((values, parts, tensors), paths, strict=False):
        made.write(path)
    size = 1 << 35
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    text = header.encode() + b" " * (-(8 + len(header)) % 64)
    good.files["model.safetensors"] = len(text).to_bytes(8, "little") + text
    good.manifest["files"]["model.safetensors"]["size"] = 8 + len(text) + size
    good.write(paths[-1])
    os.truncate(paths[-1] / "model.safetensors", 8 + len(text) + size)
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *messages, peak_mib = done.stdout.splitlines()
    expected = ["max_json_values", "max_json_bytes", "max_tensors", "sparse file"]
    assert len(messages) == len(expected), done.stdout
    assert all(part in text for part, text in zip(expected, messages, strict=True)), messages
    assert int(peak_mib) < 150


def test_limits_leave_room_for_large_models(tmp_path: Path) -> None:
    """A model with thousands of tensors and Adam's state uses a small share of each limit."""
    names = [f"model.layers.{n}.mlp.experts.{n % 64}.down_proj.weight" for n in range(2048)]
    state = {name: {"step": torch.ones(()), "exp_avg": torch.ones(1)} for name in names}
    parts = {
        "model": {name: torch.ones(1) for name in names},
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": names}]},
    }
    limits = ReadLimits(
        max_json_bytes=ReadLimits().max_json_bytes // 32,
        max_json_values=ReadLimits().max_json_values // 32,
        max_header_bytes=ReadLimits().max_header_bytes // 32,
        max_tensors=ReadLimits().max_tensors // 32,
    )
    with CheckpointStore(tmp_path, limits=limits) as store:
        store.save(1, parts)
        assert store.load("last").parts["optimizer"]["param_groups"][0]["params"] == names
        assert store.verify("last")[0].problem is None


def test_a_sparse_copy_of_a_real_checkpoint_is_read(tmp_path: Path) -> None:
    """Holes in place of zeros are read if the file has other bytes, too."""
    weights = {"w": torch.zeros(1 << 20), "b": torch.ones(1 << 15)}
    save_checkpoint(tmp_path / "a", 1, {"model": weights})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    data = path.read_bytes()
    with path.open("wb") as file:
        for begin in range(0, len(data), 4096):
            piece = data[begin : begin + 4096]
            if any(piece):
                file.seek(begin)
                file.write(piece)
        file.truncate(len(data))
    assert torch.equal(load_checkpoint(tmp_path / "b").parts["model"]["w"], weights["w"])
