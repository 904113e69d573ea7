"""Schedules by the clock, in several real processes whose clocks differ."""

from __future__ import annotations

import json
from pathlib import Path

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.run.run_state import read_run_state

SCRIPT = SCRIPTS / "clock_on_ranks.py"


def test_all_ranks_fire_at_the_same_steps(tmp_path: Path) -> None:
    """By the first rank's clock, within a hundredth of the time, after few exchanges."""
    launch(SCRIPT, tmp_path, "runs")
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
    told = launch(SCRIPT, tmp_path, "fails", fails=True).stderr
    assert "ValueError: planted on one rank" in told
    error = read_run_state(tmp_path).error  # which is told though the first rank is just ended
    assert error is not None
    assert (error.type, error.rank) == ("ValueError", 1)
