"""A job restarted by its launcher ends with the weights of an uninterrupted job."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch

from launching import SCRIPTS, command, environment
from robo_orchard_lab.pipeline.run.run_state import read_run_state

SCRIPT = SCRIPTS / "restarted_on_ranks.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(SCRIPT, folder, *arguments, restarts=1),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check_equals_uninterrupted(folder: Path, job: subprocess.Popen[str]) -> None:
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    uninterrupted, found = (
        torch.load(folder / name / "end.pt", weights_only=True) for name in ("straight", "run")
    )
    assert uninterrupted.keys() == found.keys()
    assert all(torch.equal(uninterrupted[name], found[name]) for name in uninterrupted), output
    state = read_run_state(folder / "run")
    assert (state.state, state.progress["global_step_id"]) == ("completed", 8)
    assert "start 1" in output


def test_ranks_are_restarted_after_a_kill(tmp_path: Path) -> None:
    """After rank 1 is killed in a step, the restarted job's weights are bit-identical."""
    check_equals_uninterrupted(tmp_path, start(tmp_path, "killed", "preemption"))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["preemption", "", "first"])
@pytest.mark.parametrize("place", ["killed", "step", "save", "evaluation"])
def test_ranks_are_restarted(place: str, options: str, tmp_path: Path) -> None:
    """After a kill or an error on either rank, the restarted job's weights are bit-identical."""
    check_equals_uninterrupted(tmp_path, start(tmp_path, place, options))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_ranks_are_restarted_after_a_kill_at_a_random_instant(number: int, tmp_path: Path) -> None:
    """After a kill at a random instant, the restarted job's weights are bit-identical."""
    rank = number % 2
    job = start(tmp_path, "nowhere", "slowly")
    while not (tmp_path / "run" / "run_state.json").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 1.5))
    ranks = [
        process
        for process in psutil.Process(job.pid).children()
        if process.environ().get("RANK") == str(rank)
    ]
    assert len(ranks) == 1
    os.kill(ranks[0].pid, 9)
    check_equals_uninterrupted(tmp_path, job)
