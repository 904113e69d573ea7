"""A stopped and resumed run of two processes equals an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint


def train(folder: Path, *stops: int, background: bool = False) -> list[dict[str, Any]]:
    """Return the results of each of two ranks."""
    folder.mkdir()
    kind = "background" if background else "in place"
    launch(SCRIPTS / "resume_on_ranks.py", folder, kind, *stops)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("ranks") / "straight")


def test_a_load_failure_on_one_rank_stops_all(uninterrupted: list[dict[str, Any]]) -> None:
    """All ranks raise the same kind of error, and no rank hangs."""
    assert [rank["refused"] for rank in uninterrupted] == [
        "resuming failed on rank 1: StateError: not this one",
        "not this one",
    ]


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_resume_exactly(
    background: bool, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Within windows and epochs, each rank resumes its own data, dropout and gradients."""
    stopped = train(tmp_path / "stopped", 2, 4, 7, background=background)
    for rank in (0, 1):
        assert stopped[rank]["steps"] == uninterrupted[rank]["steps"] == 8
        for part in ("losses", "weights", "random"):
            assert len(stopped[rank][part]) == len(uninterrupted[rank][part])
            for found, expected in zip(stopped[rank][part], uninterrupted[rank][part], strict=True):
                assert torch.equal(found, expected), (rank, part)
        opened = stopped[rank]["open"]
        assert max(opened) == opened[0], "a run leaves no connections between the ranks behind"
    assert not torch.equal(uninterrupted[0]["losses"][0], uninterrupted[1]["losses"][0])
    saved = load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last", ranks=None)
    assert saved.info.ranks == 2
