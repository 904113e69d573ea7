"""Job-wide events are logged once, on rank 0."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.job_log import job_logger

SCRIPT = SCRIPTS / "log_on_ranks.py"

# Events of two runs, the second resumed from the first, and their counts.
EVENTS = {
    "the optimizer holds none of the model's 4 trainable parameters": 2,
    "each of the 2 processes trains on all batches of its own loader": 2,
    "starting a fresh run": 1,
    "INFO resumed from ": 1,
    "INFO the model:": 2,
    "froze all parameters of the model": 2,
    "s left, 120 s of these for saving": 2,
    "has drop_last=True": 2,
    "step 5: eval/val/loss": 1,
    "best.safetensors: eval/val/loss is": 1,
    "step_00000005: every 5 steps": 1,
    "step_00000008: the run ends": 1,
    "SaveModel: wrote": 2,
    ": it is enough, requested by": 2,
    "stopped after": 2,
    "made a request after the last commit point, which is not executed: too late": 2,
    "made a request on rank 1 alone, after the last exchange": 2,
    "INFO nothing left to do": 2,
}


def test_an_event_is_logged_once(tmp_path: Path) -> None:
    """Each event is logged once per run, in a stopped run and in a resumed run."""
    stderr = launch(SCRIPT, tmp_path).stderr
    lines = [line for line in stderr.splitlines() if line.startswith("robo_orchard_lab")]
    assert {event: sum(event in line for line in lines) for event in EVENTS} == EVENTS
    assert max(Counter(lines).values()) == 2  # one in each run


@pytest.mark.parametrize(
    ("rank", "processes", "writes"), [("0", "2", True), ("1", "2", False), ("1", "1", True)]
)
def test_launcher_variables_decide_before_the_group_exists(
    rank: str,
    processes: str,
    writes: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before the process group exists, RANK and WORLD_SIZE decide."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with caplog.at_level(logging.INFO):
        job_logger("job").info("it is %s", "done")
    assert [record.getMessage() for record in caplog.records] == ["it is done"] * writes
