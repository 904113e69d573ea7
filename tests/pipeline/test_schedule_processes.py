"""Schedules by the clock, in several real processes whose clocks differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from robo_orchard_lab.pipeline.run_state import read_run_state

HERE = Path(__file__).parent


def launch(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    script = [str(HERE / "clock_on_ranks.py"), str(folder), kind]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launcher, *script],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_all_ranks_fire_at_the_same_steps(tmp_path: Path) -> None:
    """By the first rank's clock, within a hundredth of the time, after few exchanges."""
    done = launch(tmp_path, "runs")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank*.json")))
    assert first == second
    # Steps of half a second, the first of which starts the clock, and one that takes 20 more. Each
    # may be early by a hundredth of the time, from which the next one counts.
    by_the_clock = {
        "alone": [121, 241, 341],
        "joined": [121, 150, 241, 341],
        "pair": [181, 341],
    }
    for name, steps in by_the_clock.items():
        off = [found - step for found, step in zip(first["fired"][name], steps, strict=True)]
        assert all(-4 <= by <= 1 for by in off), first["fired"]
    times_due = 3 + 3 + 2
    assert 0 < first["collectives"] <= 10 * times_due
    assert first["others"] == 0


def test_a_rank_that_fails_alone_does_not_wait_for_the_clock(tmp_path: Path) -> None:
    """Its error ends the job: it does not ask others, who never answer, what time it is."""
    done = launch(tmp_path, "fails")
    assert done.returncode != 0
    assert "ValueError: planted on one rank" in done.stderr
    error = read_run_state(tmp_path).error  # which is told though the first rank is just ended
    assert error is not None
    assert (error.type, error.rank) == ("ValueError", 1)
