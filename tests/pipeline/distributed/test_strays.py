"""Detection of rank-local actions that all ranks must do together."""

from __future__ import annotations

from pathlib import Path

import pytest

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.distributed.job_store import RankPosition, find_diverged_rank

SCRIPT = SCRIPTS / "strays_on_ranks.py"


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("stop", 1),
        pytest.param("stop", 0, marks=pytest.mark.slow),
        pytest.param("save", 0, marks=pytest.mark.slow),
        pytest.param("evaluate", 1, marks=pytest.mark.slow),
    ],
)
def test_a_request_on_some_ranks_only_ends_the_job(kind: str, rank: int, tmp_path: Path) -> None:
    """The job fails within seconds, with the requesting hook and rank, instead of hanging."""
    stderr = launch(SCRIPT, tmp_path, kind, rank, fails=True, timeout_s=90).stderr
    assert f"rank {rank} failed first: PipelineStateError: after step 3 it had a request" in stderr
    assert f"rank {1 - rank} continued to step 4 without" in stderr
    assert "it seemed right here, requested by main.<locals>.ask (strays_on_ranks.py:" in stderr


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_weights_on_some_ranks_only_end_the_job(rank: int, tmp_path: Path) -> None:
    """The first step fails before the exchange that a rank without weights would skip."""
    stderr = launch(SCRIPT, tmp_path, "weight", rank, fails=True, timeout_s=90).stderr
    assert f"rank {rank} failed first: PipelineStateError: its batch processor returns a" in stderr
    assert (
        f"that of rank {1 - rank} without; return (outputs, loss, weight) on every rank" in stderr
    )


def test_slow_ranks_have_not_diverged() -> None:
    """Slower ranks, at an earlier step or the same commit point, have not diverged."""
    ahead = RankPosition(2, 10, 3, 10, "SaveRequest: it is time")
    assert (
        find_diverged_rank({0: ahead, 1: RankPosition(2, 10, 2, 5), 2: RankPosition(2, 4, 1, 2)}, 2)
        is None
    )
    assert find_diverged_rank({0: ahead, 1: RankPosition(2, 11, 3, 10)}, 2) is None
    assert find_diverged_rank({0: ahead, 1: RankPosition(1, 90, 1, 2)}, 2) is None  # of another run
    assert find_diverged_rank({}, 2) is None
    weighs = RankPosition(2, 1, weighted=True)
    assert (
        find_diverged_rank({0: weighs, 1: RankPosition(2, 1), 2: weighs}, 2) is None
    )  # one is slower
    found = find_diverged_rank({0: ahead, 1: RankPosition(2, 11, 2, 5)}, 2)
    assert found is not None
    assert found.rank == 0
