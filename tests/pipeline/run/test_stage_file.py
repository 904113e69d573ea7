"""Current stage of a run in stage.json."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_lab.pipeline import PipelineHooks, TrainerProgress
from robo_orchard_lab.pipeline.run.run_state import STAGE_FILE, StageFile
from run_folders import train


class Reader(PipelineHooks):
    """Hook that reads the stage in steps, evaluations and saves."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self._file = folder / STAGE_FILE
        self.on_loop.before(lambda args: self.read())
        self.on_step.before(lambda args: self.read())
        self.on_evaluation.before(lambda args: self.read())

    def read(self) -> None:
        self.found.append(json.loads(self._file.read_text()))

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {}


def test_the_stage_follows_the_run(tmp_path: Path) -> None:
    """The file names start, training, each evaluation and each save, and is gone after the run."""
    reader = Reader(tmp_path)
    train(tmp_path, hooks={"reader": reader})
    stages: list[str] = []
    for each in reader.found:
        stage = f"{each['stage']} {each['detail']}".strip()
        if stage not in stages[-1:]:
            stages.append(stage)
    of_epoch = ["training", "evaluating validation", "saving"]
    assert stages == ["starting", *of_epoch, *of_epoch]
    saved = [each for each in reader.found if each["stage"] == "saving"]
    assert [(each["step"], each["epoch"]) for each in saved] == [(7, 1), (14, 2)]
    assert {(each["total_steps"], each["max_epoch"]) for each in saved} == {(14, 2)}
    assert 0 < saved[0]["loop_seconds"] <= saved[1]["loop_seconds"]
    assert not (tmp_path / STAGE_FILE).exists()


def test_a_resumed_run_measures_its_own_pace(tmp_path: Path) -> None:
    """The first step of the loop is that of the resume; the total is that of the complete run."""
    train(tmp_path, max_epoch=1)
    reader = Reader(tmp_path)
    hooks = {"reader": PipelineHooks("other")}
    hooks["reader"].on_step.before(lambda args: reader.read())
    train(tmp_path, hooks=hooks, resume_from="auto")
    found = reader.found[0]
    assert (found["first_step"], found["step"], found["total_steps"]) == (7, 7, 14)


def test_a_stage_is_rewritten_once_a_second(tmp_path: Path) -> None:
    """Counters of the same stage are written again after a second; another stage at once."""
    progress = TrainerProgress()
    file = StageFile(progress)

    def step() -> int:
        return int(json.loads((tmp_path / STAGE_FILE).read_text())["step"])

    with file.recording(tmp_path):
        file.begin_loop(dict)
        progress.finish_step()
        file.enter("training")
        assert step() == 0
        file.enter("saving")
        assert step() == 1
        file.enter("training")
        progress.finish_step()
        ends_at = time.monotonic() + 30
        while step() == 1 and time.monotonic() < ends_at:
            file.enter("training")
        assert step() == 2


def test_a_stage_that_cannot_be_written_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is gone, and a folder in place of the file, end no run and log nothing."""
    (tmp_path / STAGE_FILE).mkdir()
    for folder in (tmp_path, tmp_path / "gone"):
        with StageFile(TrainerProgress()).recording(folder):
            pass
    assert caplog.records == []
