"""Position of runs: in progress, killed, on another machine, and with hostile files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.listing import summarize
from robo_orchard_lab.report.position import Position, age_s, last_record, read_position
from run_folders import HOSTILE, record, write_metrics
from run_in_progress import run_in_progress, wait_for_steps

STAGE = {
    "version": 1,
    "stage": "evaluating",
    "detail": "val",
    "at": "2026-01-01T00:01:00.500+00:00",
    "step": 30,
    "epoch": 2,
    "first_step": 10,
    "loop_seconds": 10.0,
    "total_steps": 100,
    "max_epoch": 5,
}
ELSEWHERE = {"pid": 1, "host": "other-machine", "started_at": 0.0, "namespace": "pid:[1]"}


def position(folder: Path) -> Position:
    return read_position(folder, folder / "metrics.jsonl", Problems())


def write(folder: Path, stage: object = None, **state: Any) -> Path:
    document = {"state": "running", "process": ELSEWHERE, **state}
    (folder / "run_state.json").write_text(json.dumps(document))
    if stage is not None:
        (folder / "stage.json").write_text(json.dumps(stage).ljust(1023) + "\n")
    return folder


def test_a_run_in_progress_has_its_stage_and_then_its_death(tmp_path: Path) -> None:
    """A run of another process is training at its newest step; after kill -9 it failed there."""
    with run_in_progress(tmp_path) as process:
        wait_for_steps(tmp_path, 50, process)
        found = position(tmp_path)
        assert found.is_running
        assert found.stage in ("training", "evaluating", "saving")
        assert found.steps is not None
        assert found.steps >= 50
        assert (found.total_steps, found.max_epoch) == (700_000, 100_000)
        assert (found.host, summarize(tmp_path).state) == (None, "running")
        assert found.seconds_left is not None
        assert found.seconds_left > 700_000 * 0.04
        age = age_s(found.at)
        assert age is not None
        assert age < 30
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        logged = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
        found = position(tmp_path)
    assert (found.verdict["state"], found.verdict["error"]["type"]) == ("failed", "Killed")
    assert (found.stage, found.seconds_left) == ("", None)
    assert found.steps is not None
    assert found.steps >= logged - 1
    summary = summarize(tmp_path)
    assert (summary.state, summary.steps) == ("failed", found.steps)
    assert summary.seconds is not None
    assert summary.seconds > logged * 0.04 - 1  # the times are whole seconds


def test_remaining_time_is_by_the_pace_of_this_start(tmp_path: Path) -> None:
    """20 steps since the resume took 10 s, so 70 steps take 35 s."""
    found = position(write(tmp_path, STAGE))
    assert (found.stage, found.detail, found.steps, found.epochs) == ("evaluating", "val", 30, 2)
    assert found.seconds_left == 35.0
    assert found.host == "other-machine"
    assert found.at == "2026-01-01T00:01:00+00:00"


def test_steps_are_those_of_the_newest_file(tmp_path: Path) -> None:
    """Of run state, stage and metrics, the largest step counts, also without a save."""
    write(tmp_path, STAGE, progress={"global_step_id": 10, "epoch_id": 0})
    assert position(tmp_path).steps == 30
    write_metrics(tmp_path, [record(31), record(32), '{"epoch_id": 0, "global_st'])
    assert position(tmp_path).steps == 32
    write(tmp_path, STAGE, progress={"global_step_id": 50, "epoch_id": 4}, state="completed")
    found = position(tmp_path)
    assert (found.steps, found.epochs, found.stage, found.seconds_left) == (50, 4, "", None)


@pytest.mark.parametrize(
    "stage",
    [
        [],
        {},
        {"stage": 3, "detail": [HOSTILE], "at": HOSTILE, "step": -1, "total_steps": "x"},
        {**STAGE, "loop_seconds": 1e300},
        {**STAGE, "first_step": 30},
        {**STAGE, "total_steps": 10},
        {**STAGE, "step": 2**70, "epoch": 1.5},
        {**STAGE, "loop_seconds": -1, "since": 7},
        HOSTILE,
        {**STAGE, "detail": "x" * 5000},
    ],
)
def test_a_hostile_stage_has_no_remaining_time(tmp_path: Path, stage: object) -> None:
    """Values of wrong types and sizes are ignored; nothing fails."""
    found = position(write(tmp_path, stage))
    assert found.seconds_left is None
    assert found.is_running


def test_a_torn_or_special_stage_file_is_left_out(tmp_path: Path) -> None:
    """A torn file, a link and a pipe give no stage, and do not block."""
    file = tmp_path / "stage.json"
    (tmp_path / "other.json").write_text(json.dumps(STAGE))
    write(tmp_path)
    file.write_text(json.dumps(STAGE)[:40])
    assert position(tmp_path).stage == ""
    file.unlink()
    file.symlink_to(tmp_path / "other.json")
    assert position(tmp_path).stage == ""
    file.unlink()
    os.mkfifo(file)
    assert position(tmp_path).stage == ""


def test_the_last_record_is_found_at_the_end_of_a_large_file(tmp_path: Path) -> None:
    """Only the end of the file is read; damaged and cut lines are ignored."""
    lines = [record(step) for step in range(5000)]
    folder = write_metrics(tmp_path, [*lines, "{broken}\n", "\x00\n", '{"global_step_id": 9'])
    assert last_record(folder / "metrics.jsonl")["global_step_id"] == 4999
    assert last_record(folder / "none.jsonl") == {}
    assert last_record(folder) == {}
