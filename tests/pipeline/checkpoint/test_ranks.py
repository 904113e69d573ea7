"""Saving and loading in several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.checkpoint import ReadLimits, load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.checkpoint.manifest import parse_manifest
from robo_orchard_lab.pipeline.errors import CheckpointError

SCRIPT = SCRIPTS / "store_on_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_each_rank_loads_its_own_parts(found: list[dict[str, Any]]) -> None:
    """Parts of the job are the first rank's; each rank has its own rank parts."""
    for rank, of_rank in enumerate(found):
        assert of_rank["saved"] == [1, 1, 2, "step_00000001"]
        assert of_rank["loaded"] == [0, rank]
        assert of_rank["stream"] == [rank] * 4
        assert of_rank["one"] == rank


def test_background_save_does_not_disturb_collectives(found: list[dict[str, Any]]) -> None:
    """Collectives of a background save do not mix with those of training."""
    assert [of_rank["exchanged"] for of_rank in found] == [100.0, 100.0]
    assert [of_rank["second"] for of_rank in found] == [2.0 * (1 << 20)] * 2


def test_failure_on_one_rank_is_raised_on_all(found: list[dict[str, Any]]) -> None:
    """A bad value and a full disk on the second rank are raised on both, and leave no files."""
    first, second = found
    assert [of_rank["bad_value"][0] for of_rank in found] == ["StateError"] * 2
    assert "failed on rank 1: StateError: the part 'data'" in first["bad_value"][1]
    assert [of_rank["cannot_write"][0] for of_rank in found] == ["CheckpointError"] * 2
    assert "failed on rank 1: " in first["cannot_write"][1]
    assert "File too large" in second["cannot_write"][1]
    assert [of_rank["no_step"][0] for of_rank in found] == ["CheckpointError"] * 2
    names = [".lock", "last", "step_00000001", "step_00000002"]
    assert [of_rank["names"] for of_rank in found] == [names, names]


def test_all_ranks_fall_back_together(found: list[dict[str, Any]]) -> None:
    """A damaged file of the second rank makes both ranks load the older checkpoint."""
    for of_rank in found:
        assert of_rank["newest"] == [1, ["step_00000002"]]
        assert of_rank["verified"] == [True, False]
        assert of_rank["pruned"] == [False, False]


def test_refusals_are_raised_on_all_ranks(found: list[dict[str, Any]]) -> None:
    """A held lock and an existing directory are errors on both ranks."""
    assert [of_rank["locked"] for of_rank in found] == [["StoreLockedError"]] * 2
    assert [of_rank["exists"] for of_rank in found] == [["FileExistsError"]] * 2


def test_different_world_size_is_detected(folder: Path, found: list[dict[str, Any]]) -> None:
    """A rank that did not save loads the last rank's parts; each_rank receives all ranks' parts."""
    assert [of_rank["fewer"] for of_rank in found] == [{"data": {"rank": 0}}] * 2
    assert [of_rank["of_ranks"] for of_rank in found] == [[[0, 1, 0]]] * 2
    alone = load_checkpoint(
        folder / "run" / "step_00000001",
        each_rank=lambda index, count, own: (index, count, own["data"]["rank"]),
    )
    assert alone.info.ranks == 2
    assert alone.rank_parts["data"] == {"rank": 0}
    assert alone.rank_results == ((0, 2, 0), (1, 2, 1))


def test_each_rank_part_is_read_once(folder: Path) -> None:
    """A limit of exactly the checkpoint's bytes suffices; one byte less does not."""
    path = folder / "run" / "step_00000001"
    size = load_checkpoint(path).info.size_bytes
    all_of_it = ReadLimits(max_total_bytes=size)
    own = load_checkpoint(path, limits=all_of_it, each_rank=lambda index, count, own: own)
    assert [state["data"]["rank"] for state in own.rank_results] == [0, 1]
    less = ReadLimits(max_total_bytes=size - 1)
    with pytest.raises(CheckpointError, match=f"{size} bytes to read; at most {size - 1} are"):
        load_checkpoint(path, limits=less, each_rank=lambda index, count, own: own)


def test_parts_of_another_rank_are_verified_when_read(folder: Path) -> None:
    """One process reads its own parts alone, or those of all ranks, one of which is damaged."""
    damaged = folder / "run" / "step_00000002"
    with pytest.raises(CheckpointError, match=r"rank00001\.json"):
        load_checkpoint(damaged, each_rank=lambda index, count, own: own)
    assert load_checkpoint(damaged).info.step == 2


def test_missing_rank_files_are_refused(tmp_path: Path) -> None:
    """A manifest can claim up to 65,536 ranks; the first rank without a file is named."""
    path = tmp_path / "saved"
    save_checkpoint(path, 1, {"trainer": 1}, {"data": 1})
    manifest = parse_manifest((path / "manifest.json").read_bytes(), ReadLimits())
    (path / "manifest.json").write_bytes(replace(manifest, ranks=60_000).to_bytes())
    with pytest.raises(CheckpointError, match="has no files of rank 1; it was saved by"):
        load_checkpoint(path, each_rank=lambda index, count, own: own)
