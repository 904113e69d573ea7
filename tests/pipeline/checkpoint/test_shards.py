"""Tensors in shards of several processes, as one process reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from hostile_checkpoints import Made
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    ReadLimits,
    Region,
    TensorShare,
    export_weights,
    load_checkpoint,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.errors import CheckpointError

WHOLE = torch.arange(21.0).reshape(7, 3)
FIRST, SECOND = "model.shard00000.safetensors", "model.shard00001.safetensors"


def shard_file(offsets: Any, value: torch.Tensor, shape: Any = (7, 3), name: str = "w") -> bytes:
    info = {name: {"saved_offsets": offsets, "full_shape": shape}}
    metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(info)}
    return safetensors.torch.save({name: value.contiguous()}, metadata)


def two_shards(folder: Path) -> Made:
    """Checkpoint of two processes: rows of one tensor, and a complete bias."""
    save_checkpoint(folder, 3, {"model": {"bias": torch.ones(2)}, "trainer": {"step": 3}})
    made = Made.read(folder)
    made.manifest["ranks"] = 2
    put(made, FIRST, shard_file((0, 0), WHOLE[:4]))
    put(made, SECOND, shard_file((4, 0), WHOLE[4:]))
    return made


def put(made: Made, name: str, data: bytes) -> None:
    made.files[name] = data
    made.sign(name)


def test_shards_are_joined(tmp_path: Path) -> None:
    """Shards load next to complete tensors, and export to a file that safetensors reads."""
    two_shards(tmp_path / "a").write(tmp_path / "b")
    found = load_checkpoint(tmp_path / "b").parts["model"]
    assert torch.equal(found["w"], WHOLE)
    assert torch.equal(found["bias"], torch.ones(2))
    export_weights(tmp_path / "b", tmp_path / "model.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert exported.keys() == {"w", "bias"}
    assert torch.equal(exported["w"], WHOLE)


@given(row=st.integers(0, 7), rows=st.integers(0, 7), column=st.integers(0, 3))
def test_any_region_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, row: int, rows: int, column: int
) -> None:
    """Any rows and columns load, from shards and from complete tensors."""
    rows = min(rows, 7 - row)
    folder = tmp_path_factory.mktemp("part")
    two_shards(folder / "a").write(folder / "b")
    region = Region((row, column), (rows, 3 - column))
    save_checkpoint(folder / "c", 3, {"model": {"w": WHOLE}})
    for name in ("b", "c"):
        found = load_checkpoint(
            folder / name,
            share_of=lambda name, shape: TensorShare(region, torch.clone) if name == "w" else None,
        )
        expected = WHOLE[row : row + rows, column:]
        assert torch.equal(found.parts["model"]["w"], expected)


def test_unneeded_file_is_not_read(tmp_path: Path) -> None:
    """A process whose share lies in one file reads that file alone; verify reads all."""
    made = two_shards(tmp_path / "a")
    made.write(tmp_path / "step_00000003")
    path = tmp_path / "step_00000003" / SECOND
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    share = TensorShare(Region((0, 0), (2, 3)), torch.clone)
    found = load_checkpoint(
        path.parent, share_of=lambda name, shape: share if name == "w" else None
    )
    assert torch.equal(found.parts["model"]["w"], WHOLE[:2])
    with pytest.raises(CheckpointError, match=f"{SECOND}: its digest is"):
        load_checkpoint(path.parent)
    (problem,) = CheckpointStore(tmp_path).verify()
    assert SECOND in str(problem.problem)


def without_a_file(made: Made) -> None:
    del made.files[SECOND], made.manifest["files"][SECOND]


def of_another_rank(made: Made) -> None:
    put(made, "model.shard00002.safetensors", shard_file((0, 0), WHOLE[:4]))


def as_json(made: Made) -> None:
    put(made, "model.shard00001.json", b"{}")


def complete_as_well(made: Made) -> None:
    put(made, "model.safetensors", safetensors.torch.save({"w": WHOLE}))


def without_places(made: Made) -> None:
    put(made, SECOND, safetensors.torch.save({"w": WHOLE[4:]}))


def places_of_others(made: Made) -> None:
    put(made, SECOND, shard_file((4, 0), WHOLE[4:]).replace(b'\\"w\\"', b'\\"v\\"'))


def second(offsets: Any, value: torch.Tensor, shape: Any = (7, 3)) -> Callable[[Made], None]:
    return lambda made: put(made, SECOND, shard_file(offsets, value, shape))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_file, r"have 12 elements, expected each of the 21 of \[7, 3\] once"),
        (of_another_rank, "lists a file 'model.shard00002.safetensors'"),
        (as_json, "lists a file 'model.shard00001.json'"),
        (complete_as_well, "the tensor 'w' is saved complete and in shards"),
        (without_places, "has no valid DCP_SHARDING_INFO"),
        (places_of_others, "does not list the tensors of the file"),
        (second((3, 0), WHOLE[4:]), r"expected each of the 21 of \[7, 3\] once"),
        (second((4, 0), WHOLE[4:6]), "have 18 elements"),
        (second((5, 0), WHOLE[4:]), "places the shard 'w'"),
        (second((-1, 0), WHOLE[4:]), "places the shard 'w'"),
        (second((4.0, 0), WHOLE[4:]), "places the shard 'w'"),
        (second((4, True), WHOLE[4:]), "places the shard 'w'"),
        (second((4,), WHOLE[4:]), "places the shard 'w'"),
        (second("40", WHOLE[4:]), "places the shard 'w'"),
        (second((4, 0), WHOLE[4:], (2**40, 2**40)), "places the shard 'w'"),
        (second((4, 0), WHOLE[4:], (8, 3)), "those of different tensors"),
        (second((4, 0), WHOLE[4:].int()), "those of different tensors"),
    ],
)
def test_inconsistent_shards_are_refused(
    spoil: Callable[[Made], None], message: str, tmp_path: Path
) -> None:
    """Shards that overlap, are missing, exceed the tensor or have invalid offsets are errors."""
    made = two_shards(tmp_path / "a")
    spoil(made)
    made.write(tmp_path / "b")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "b")
    assert str(tmp_path / "b") in str(error.value)


def test_too_large_tensor_is_refused_before_reading(tmp_path: Path) -> None:
    """The size of the assembled tensor counts, not the size of the files."""
    two_shards(tmp_path / "a").write(tmp_path / "b")
    with pytest.raises(CheckpointError, match="bytes to read; at most 200 are"):
        load_checkpoint(tmp_path / "b", limits=ReadLimits(max_total_bytes=200))


def test_limit_counts_all_bytes(tmp_path: Path) -> None:
    """Complete tensors, assembled tensors and the largest file of shards count together."""
    two_shards(tmp_path / "a").write(tmp_path / "b")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    total = sizes["model.safetensors"] + sizes["trainer.json"] + WHOLE.nbytes + sizes[FIRST]
    load_checkpoint(tmp_path / "b", limits=ReadLimits(max_total_bytes=total))
    with pytest.raises(CheckpointError, match=f"{total} bytes to read; at most {total - 1} are"):
        load_checkpoint(tmp_path / "b", limits=ReadLimits(max_total_bytes=total - 1))


def test_shards_in_two_dimensions(tmp_path: Path) -> None:
    """Four corners make up a tensor; three do not, nor four with a duplicate."""
    save_checkpoint(tmp_path / "a", 3, {"trainer": {}})
    made = Made.read(tmp_path / "a")
    made.manifest["ranks"] = 4
    corners = [(0, 0, 4, 2), (0, 2, 4, 1), (4, 0, 3, 2), (4, 2, 3, 1)]
    for rank, (row, column, rows, columns) in enumerate(corners):
        value = WHOLE[row : row + rows, column : column + columns]
        put(made, f"model.shard{rank:05d}.safetensors", shard_file((row, column), value))
    made.write(tmp_path / "b")
    assert torch.equal(load_checkpoint(tmp_path / "b").parts["model"]["w"], WHOLE)
    put(made, "model.shard00001.safetensors", shard_file((4, 0), WHOLE[4:6, :2]))
    made.write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="have 21 elements, expected each"):
        load_checkpoint(tmp_path / "c")


def test_export_requires_weights(tmp_path: Path) -> None:
    """A part that is missing or no mapping of tensors is refused by name."""
    save_checkpoint(tmp_path / "a", 3, {"trainer": {"step": 3}})
    for part in ("trainer", "model"):
        with pytest.raises(CheckpointError, match=f"has no part '{part}' of tensors by name"):
            export_weights(tmp_path / "a", tmp_path / "x.safetensors", part=part)
    assert not (tmp_path / "x.safetensors").exists()
