"""The hook that writes the report of a run: when, what, and failures."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import ReportConfig
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from run_folders import Page, train
from tiny import make_trainer

LONGEST_S = 60.0


def story(folder: Path) -> dict[str, Any]:
    """Return the embedded data of a run's report."""
    found: dict[str, Any] = Page((folder / "report.html").read_text()).data["runs"][0]
    return found


def test_the_report_of_a_failed_run_names_hook_and_line(tmp_path: Path) -> None:
    """After an error, the report has the outcome, the hook, and each value up to the error."""
    hooks = PipelineHooks("breaks")

    @hooks.on_step.before(when="at steps 10")
    def break_down(args: PipelineHookArgs) -> None:
        raise RuntimeError("no more <b>data</b>")

    with pytest.raises(RuntimeError, match="no more"):
        train(tmp_path, {"report": ReportConfig(), "breaks": hooks})
    found = story(tmp_path)
    verdict = found["verdict"]
    assert (verdict["state"], verdict["steps"]) == ("failed", 9)
    assert verdict["error"]["message"] == "no more <b>data</b>"
    assert "'breaks'" in verdict["error"]["hook"]
    assert found["series"]["loss/total"]["x"] == [*range(1, 10)]
    assert found["events"][-1]["text"] == "failed: RuntimeError: no more <b>data</b>"


def test_a_report_appears_during_the_run(tmp_path: Path) -> None:
    """The report of the first epoch is there within the second one, for an interval of 0."""
    seen: list[dict[str, Any]] = []
    hooks = PipelineHooks("reader")

    @hooks.on_step.after(when="at steps 8")
    def wait(args: PipelineHookArgs) -> None:
        ends_at = time.monotonic() + LONGEST_S
        while not (tmp_path / "report.html").exists() and time.monotonic() < ends_at:
            time.sleep(0.02)
        seen.append(story(tmp_path))

    train(tmp_path, {"report": ReportConfig(every_seconds=0), "reader": hooks})
    [during] = seen
    assert (during["verdict"]["state"], during["verdict"]["steps"]) == ("running", 7)
    assert during["series"]["eval/val/loss"]["x"] == [7]
    assert (story(tmp_path)["verdict"]["state"], story(tmp_path)["verdict"]["steps"]) == (
        "completed",
        14,
    )


def test_the_report_of_a_script_has_its_environment(tmp_path: Path) -> None:
    """Without an experiment file and a checkpoint, the report has command, versions and hooks."""
    train(tmp_path, {"report": ReportConfig(), "checkpoint": PipelineHooks("none")})
    found = story(tmp_path)
    environment = found["environment"]
    assert environment["command"] == shlex.join(sys.orig_argv)
    assert environment["versions"]["torch"] == torch.__version__
    assert (environment["host"], environment["folder"]) == (socket.gethostname(), os.getcwd())
    values = {item["path"]: item["value"] for item in found["configuration"]}
    assert values["optimizer.class"] == "torch.optim.sgd:SGD"
    assert values["hooks.log.every"] == "1 step"
    assert found["problems"] == []


def test_a_run_removes_temporary_files_of_a_killed_run(tmp_path: Path) -> None:
    """Files that a killed writer of plan, report or media left are gone; those of ranks stay."""
    names = [".plan.json", ".report.html", "media/x/.00000001.png", "media/.index.jsonl"]
    left = [tmp_path / f"{name}.{'0' * 32}.tmp" for name in [*names, "media/rank1/x/.1.png"]]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train(tmp_path, {"report": ReportConfig()})
    assert list(tmp_path.rglob("*.tmp")) == left[-1:]


def test_a_report_that_cannot_be_written_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run continues without its report; the log has one error with file and reason."""
    (tmp_path / "report.html").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        train(tmp_path, {"report": ReportConfig(every_seconds=0)})
    [error] = [r.getMessage() for r in caplog.records if "report.html" in r.getMessage()]
    assert error.startswith(f"Report: writing {tmp_path / 'report.html'} failed; the run continues")
    assert error.endswith("report.html can't be written: Is a directory")


def test_a_run_without_a_folder_has_no_report(caplog: pytest.LogCaptureFixture) -> None:
    """Without a run folder, the hook warns and does nothing."""
    make_trainer(ReportConfig(), max_step=1)()
    assert "there is no report, since the trainer has no run_folder" in caplog.text


def test_the_hook_changes_nothing() -> None:
    """The hook has no state, leaves weights unchanged and makes no device sync."""
    assert_state_round_trip(ReportConfig())
    assert_weights_unchanged(ReportConfig())
    assert_no_device_sync(ReportConfig())
