"""Several real processes under torchrun."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from launching import SCRIPTS, launch


def launch_training(
    folder: Path, processes: int, accumulate: int = 1, kind: str = "step"
) -> subprocess.CompletedProcess[str]:
    """Launch ranks with global batches of four; ``kind`` selects the script's variant."""
    folder.mkdir()
    script = SCRIPTS / "train_on_ranks.py"
    return launch(script, folder, accumulate, 4 // processes, kind, processes=processes)


def train(
    folder: Path, processes: int, accumulate: int, kind: str = "step"
) -> list[dict[str, torch.Tensor]]:
    """Return the results saved by each rank."""
    launch_training(folder, processes, accumulate, kind)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("rank*.pt"))]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train_like_one(accumulate: int, tmp_path: Path) -> None:
    """Equal global batches give equal weights, and the LR scheduler steps once per update."""
    (alone,) = train(tmp_path / "one", 1, accumulate)
    ranks = train(tmp_path / "two", 2, accumulate)
    assert len(ranks) == 2
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-9, atol=1e-12)
        assert rank["updates"] == alone["updates"] == (14 if accumulate == 1 else 6)
        assert rank["moves"] == rank["updates"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_a_plateau_uses_the_loss_of_all_ranks(tmp_path: Path) -> None:
    """ReduceLROnPlateau sees the mean loss of all ranks, so the ranks keep one learning rate."""
    (alone,) = train(tmp_path / "one", 1, 1, "plateau")
    ranks = train(tmp_path / "two", 2, 1, "plateau")
    assert alone["rate"] < 0.1
    assert ranks[0]["rate"] == ranks[1]["rate"] == alone["rate"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_data_that_is_not_sharded_is_warned_about(tmp_path: Path) -> None:
    """Rank 0 warns once that each rank reads all batches of its own loader."""
    assert "each of the" not in launch_training(tmp_path / "one", 1, kind="list").stderr
    stderr = launch_training(tmp_path / "two", 2, kind="list").stderr
    assert stderr.count("each of the 2 processes trains on all batches of its own loader") == 1


def test_known_batch_counts_need_no_exchange(tmp_path: Path) -> None:
    """A map-style dataset needs no exchange per step, and a list two per epoch."""
    at_the_start, epochs = 1, 2
    for kind, in_an_epoch in (("step", 0), ("list", 2)):
        for rank in train(tmp_path / kind, 2, 1, kind):
            assert rank["collectives"] == at_the_start + epochs * in_an_epoch


def test_gradients_are_reduced_once_per_update(tmp_path: Path) -> None:
    """Within an accumulation window ranks keep local gradients, which agree at its end."""
    ranks = train(tmp_path / "two", 2, 3)
    agree = [torch.equal(a, b) for a, b in zip(*(rank["gradients"] for rank in ranks), strict=True)]
    assert agree == ([False, False, True] * 2 + [True]) * 2
