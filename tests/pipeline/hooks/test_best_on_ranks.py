"""A metric published every 4 steps and logged every 10 is judged at its own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "best_on_ranks.py"


def run(folder: Path, reduce: str, processes: int) -> list[dict[str, Any]]:
    launch(SCRIPT, folder, reduce, processes=processes)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("reduce", ["mean", "rank 0", "last", "sum", "max"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_best_step_is_kept(reduce: str, processes: int, tmp_path: Path) -> None:
    """File, checkpoint and stop follow the values of the publishing steps, on every rank."""
    ranks = run(tmp_path, reduce, processes)
    for rank in ranks:
        assert rank["best"] == [pytest.approx(0.9), 8]
        assert (rank["kept"], rank["checkpoint"]) == ([8], [8])
        assert rank["checkpoints"] == ["step_00000008", "step_00000020"]
        steps, reason = rank["stopped"]
        assert rank["lr"] == 0.1 / 2**3  # at steps 12, 16 and 20
        assert (steps, "did not improve on 0.9000 (step 8) in 3" in reason) == (20, True)
        judged = [step for name, step, _ in rank["records"] if name == "rollout/success"]
        assert judged == [4, 8, 12, 16, 20]
        sums = [[s, v] for name, s, v in rank["records"] if name == "unmonitored"]
        assert sums == [[10, 10.0 * processes], [20, 10.0 * processes]]
    assert ranks[0]["records"] == ranks[-1]["records"]


def test_a_metric_of_one_rank_is_refused(tmp_path: Path) -> None:
    """The error names the metric, its hook and the remedy, within seconds."""
    done = launch(SCRIPT, tmp_path, "only rank 0", fails=True)
    assert "rollout/success for SaveCheckpoint" in done.stderr
    assert "on every rank, with weight=0 where there is no value" in done.stderr
