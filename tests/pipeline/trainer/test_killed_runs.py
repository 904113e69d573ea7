"""Exact resume of runs that save every step and are killed again and again."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from full_training import STEPS, STEPS_OF_TWO, build
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing import prove_resume

SAVES = ["every step", "in background"]


def kill_until(
    kills: int, folder: Path, *, dies: bool = False, processes: int = 1, **options: Any
) -> None:
    """Kill runs at random instants, each as often as it has steps, until `kills` were killed.

    With ``dies``, processes kill themselves before a random file system call.
    """
    steps = STEPS if processes == 1 else STEPS_OF_TWO
    done = rounds = 0
    while done < kills:
        rounds += 1
        assert rounds < kills, "hardly any process lives long enough to be killed"
        stops = sorted(random.choices(range(1, steps + 1), k=min(steps, kills - done)))
        root = folder / str(rounds)
        proof = prove_resume(
            partial(build, dies=len(stops) * processes if dies else 0, **options),
            None,
            stops,
            kill=True,
            folder=root,
            files=["metrics.jsonl"],
            processes=processes,
        )
        proof.check()  # fails if a process began before an acknowledged checkpoint
        assert proof.kills is not None
        done += proof.kills
        run_folder = root / "resumed"
        names = {path.name for path in (run_folder / "checkpoints").iterdir()}
        kept = {".lock", "last", f"step_{steps - 1:08d}", f"step_{steps:08d}"}
        assert names == kept  # also after kills before the removal of old checkpoints
        assert [path for path in run_folder.rglob("*") if "tmp" in path.name] == []
        assert read_run_state(run_folder).state == "completed"


@pytest.mark.parametrize("saves", SAVES)
def test_a_run_killed_at_random_instants_resumes_exactly(saves: str, tmp_path: Path) -> None:
    """No acknowledged save is lost, and the next start resumes exactly by itself."""
    kill_until(10, tmp_path, saves=saves)


def test_a_run_killed_at_file_system_calls_resumes_exactly(tmp_path: Path) -> None:
    """A process killed before opening, renaming or removing a file resumes exactly."""
    kill_until(8, tmp_path, saves="in background", dies=True)


@pytest.mark.parametrize("dies", [False, True], ids=["at any instant", "at a call"])
def test_two_killed_ranks_resume_exactly(dies: bool, tmp_path: Path) -> None:
    """Two ranks resume exactly after one rank is killed and the other soon after."""
    kill_until(4, tmp_path, saves="in background", dies=dies, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True], ids=["at any instant", "at a call"])
@pytest.mark.parametrize("saves", SAVES)
def test_two_ranks_killed_often_resume_exactly(saves: str, dies: bool, tmp_path: Path) -> None:
    """Two ranks resume exactly after many kills."""
    kill_until(24, tmp_path, saves=saves, dies=dies, processes=2, workers=0 if dies else 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("saves", SAVES)
def test_a_run_killed_at_many_random_instants_resumes_exactly(
    saves: str, workers: int, tmp_path: Path
) -> None:
    """A run resumes exactly after hundreds of kills."""
    kill_until(60, tmp_path, saves=saves, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("saves", SAVES)
def test_a_run_killed_at_many_file_system_calls_resumes_exactly(saves: str, tmp_path: Path) -> None:
    """A run resumes exactly after many kills at file system calls."""
    kill_until(40, tmp_path, saves=saves, dies=True)
