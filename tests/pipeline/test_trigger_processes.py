"""Clock triggers in several real processes with different clocks."""

from __future__ import annotations

import json
from pathlib import Path

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.run.run_state import read_run_state

SCRIPT = SCRIPTS / "clock_on_ranks.py"


def test_all_ranks_fire_at_the_same_steps(tmp_path: Path) -> None:
    """Hooks fire by the clock of rank 0, within 1 % of the period, after few exchanges."""
    launch(SCRIPT, tmp_path, "runs")
    first, second = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank*.json")))
    assert first == second
    # Steps of half a second; the first starts the clock, and one takes 10 s more. Each time may be
    # 1 % of the period early, and the next period starts there.
    expected = {
        "alone": [121, 241, 341],
        "joined": [121, 150, 241, 341],
        "pair": [181, 341],
    }
    for name, steps in expected.items():
        off = [found - step for found, step in zip(first["fired"][name], steps, strict=True)]
        assert all(-4 <= by <= 1 for by in off), first["fired"]
    fired = 3 + 3 + 2
    assert 0 < first["collectives"] <= 10 * fired
    assert first["others"] == 0


def test_failing_rank_does_not_wait_for_the_clock(tmp_path: Path) -> None:
    """The error ends the job: the failing rank enters no exchange with the others."""
    output = launch(SCRIPT, tmp_path, "fails", fails=True).stderr
    assert "ValueError: planted on one rank" in output
    error = read_run_state(tmp_path).error  # recorded although rank 0 is terminated
    assert error is not None
    assert (error.type, error.rank) == ("ValueError", 1)
