"""Exact resume on every rank after stops and kills."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import killed_on_ranks
from killed_on_ranks import STEPS
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing.resume_worker import RandomKill, run_processes
from robo_orchard_lab.testing.run_record import RunRecord, read_record, record_differences

STEP_S = 0.05  # about


def start(
    folder: Path, name: str, should_kill: RandomKill | None = None, ranks: int = 2, **order: Any
) -> list[int]:
    """Run all ranks to their end and return their exit codes."""
    order |= {"ranks": ranks, "meeting": str(folder / f"{name}.meeting"), "folder": str(folder)}
    records = [folder / f"{name}-{rank}.jsonl" for rank in range(ranks)]
    orders = [{"rank": rank, "record": str(path), **order} for rank, path in enumerate(records)]
    folder.mkdir(exist_ok=True, parents=True)
    logs = [path.with_suffix(".log") for path in records]
    return run_processes(killed_on_ranks.run, orders, logs, 120, should_kill)


def records(folder: Path, name: str, rank: int) -> list[RunRecord]:
    paths = sorted(folder.glob(f"{name}-{rank}.jsonl"))
    return [record for path in paths if (record := read_record(path)) is not None]


def run_uninterrupted(folder: Path, **order: Any) -> None:
    codes = start(folder, "run", **order)
    assert not any(codes), (folder / "run-0.log").read_text()


def check_rank_consistency(uninterrupted: Path, folder: Path, ranks: int = 2) -> None:
    """Check that each rank's processes together equal one uninterrupted process."""
    for rank in range(ranks):
        (expected,) = records(uninterrupted, "run", rank)
        found = [*record_differences(expected, records(folder, "run*", rank), ())]
        assert [f"{d}: {d.straight} {d.resumed}" for d in found] == [], rank


@pytest.mark.parametrize(("ranks", "stops"), [(2, [1, 2, 4, 7, 8]), (3, [1, 4])])
def test_stopped_ranks_resume_exactly(ranks: int, stops: list[int], tmp_path: Path) -> None:
    """Within and between windows and epochs, each rank resumes exactly, buffers included.

    Three ranks round the sums of their gradients by the order of addition.
    """
    run_uninterrupted(tmp_path / "straight", ranks=ranks, in_background=False)
    folder = tmp_path / "stopped"
    for number, stop in enumerate([*stops, None]):
        name = f"run{number}"
        codes = start(folder, name, ranks=ranks, stop_after=stop, in_background=False)
        assert not any(codes), (folder / f"{name}-0.log").read_text()
    check_rank_consistency(tmp_path / "straight", folder, ranks)


def kill_again_and_again(tmp_path: Path, kills: int, in_background: bool) -> None:
    uninterrupted, folder = tmp_path / "straight", tmp_path / "killed"
    run_uninterrupted(uninterrupted, in_background=in_background)
    acknowledged = 0
    steps = sorted(random.choices(range(1, STEPS), k=kills))
    for number, step in enumerate(steps):
        written = [folder / f"run{number:03d}-{rank}.jsonl" for rank in range(2)]
        killing = RandomKill(written, step, STEP_S)
        start(folder, f"run{number:03d}", killing, in_background=in_background)
        for rank in range(2):
            for begun in records(folder, f"run{number:03d}", rank):
                assert begun.start >= acknowledged, "an acknowledged checkpoint was lost"
        saved = read_run_state(folder).checkpoint if (folder / "run_state.json").exists() else None
        acknowledged = saved.step if saved else 0
    codes = start(folder, f"run{kills:03d}", in_background=in_background)
    assert codes == [0, 0], (folder / f"run{kills:03d}-0.log").read_text()
    check_rank_consistency(uninterrupted, folder)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    kept = {".lock", "last", f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"}
    assert names == kept  # also after kills before the removal of old checkpoints


@pytest.mark.parametrize("in_background", [False, True])
def test_killed_ranks_resume_exactly(in_background: bool, tmp_path: Path) -> None:
    """Whichever rank dies first, the next start of both ranks resumes exactly."""
    kill_again_and_again(tmp_path, 3, in_background)


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_ranks_killed_often_resume_exactly(in_background: bool, tmp_path: Path) -> None:
    """After many kills, both ranks resume exactly."""
    for number in range(3):
        kill_again_and_again(tmp_path / str(number), 8, in_background)
