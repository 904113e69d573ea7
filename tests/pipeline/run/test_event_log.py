"""Events of runs in events.jsonl."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import HELPERS
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, TrainerProgress
from robo_orchard_lab.pipeline.hooks import NonFiniteGuardConfig
from robo_orchard_lab.pipeline.run.event_log import MAX_OF_A_KIND, EventLog
from run_folders import train
from tiny import make_model, make_trainer

logger = logging.getLogger("robo_orchard_lab.pipeline.hooks.test")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_resumed_run_appends_its_events(tmp_path: Path) -> None:
    """The file has the events of all processes of a run, each with its step."""
    train(tmp_path, max_epoch=1)
    train(tmp_path, resume_from="auto")
    found = [(event["event"], event["step"]) for event in events(tmp_path)]
    of_epoch = [[("evaluation", s), ("save", s), ("end", s)] for s in (7, 14)]
    assert found == [("start", 0), *of_epoch[0], ("resume", 7), *of_epoch[1]]


def test_skipped_updates_and_warnings_are_events(tmp_path: Path) -> None:
    """A skipped update has the step and the reason; warnings of the package's log are events."""
    model = make_model()
    hooks = PipelineHooks("spoils")

    @hooks.on_model_backward.before(when="at steps 3")
    def spoil(args: PipelineHookArgs) -> None:
        assert args.attached_loss is not None
        args.attached_loss = args.attached_loss * torch.nan
        logger.warning("spoiled\n%s", "step")

    guard = NonFiniteGuardConfig(policy="skip")
    make_trainer([hooks, guard], model=model, max_step=4, run_folder=tmp_path)()
    found = events(tmp_path)
    [skipped] = [event for event in found if event["event"] == "skipped update"]
    assert skipped["step"] == 3
    assert "loss" in skipped["text"]
    assert "spoiled\nstep" in [event["text"] for event in found if event["event"] == "warning"]


def test_a_cut_line_does_not_swallow_the_next_event(tmp_path: Path) -> None:
    """After a line that a crash cut, the next event begins on a new line."""
    (tmp_path / "events.jsonl").write_text('{"event": "sta')
    log = EventLog(TrainerProgress())
    with log.recording(tmp_path):
        log.add("save", "first")
    first, second = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (first, json.loads(second)["text"]) == ('{"event": "sta', "first")


def test_events_of_one_kind_are_bounded(tmp_path: Path) -> None:
    """A kind has at most MAX_OF_A_KIND events; the last one says so."""
    log = EventLog(TrainerProgress())
    with log.recording(tmp_path):
        for _ in range(MAX_OF_A_KIND + 5):
            log.add("skipped update", "NaN")
        log.add("save", "first")
    found = events(tmp_path)
    assert len(found) == MAX_OF_A_KIND + 1
    assert found[-2]["text"] == "NaN; later events of this kind are not recorded"


def test_events_that_cannot_be_written_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose events can't be written continues, with one error in the log."""
    (tmp_path / "other").write_text("")
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "other")
    log = EventLog(TrainerProgress())
    with log.recording(tmp_path):
        log.add("save", "first")
        log.add("save", "second")
    assert [r.getMessage().partition(" failed")[0] for r in caplog.records] == [
        f"the trainer: writing {tmp_path / 'events.jsonl'}"
    ]
    assert (tmp_path / "other").read_text() == ""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_record_nothing(tmp_path: Path) -> None:
    """A worker that was forked while an event was recorded neither waits nor records."""
    log = EventLog(TrainerProgress())
    with log.recording(tmp_path):
        log.add("save", "first")
        child = os.fork()
        if child == 0:
            log.add("warning", "of a worker")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert [event["text"] for event in events(tmp_path)] == ["first"]


def test_warnings_reach_standard_error_without_logging(tmp_path: Path) -> None:
    """A script without logging shows warnings on standard error, once, as without events."""
    code = (
        f"import sys, logging; sys.path.insert(0, {str(HELPERS)!r})\n"
        "from tiny import make_trainer\n"
        "from robo_orchard_lab.pipeline import PipelineHooks\n"
        "hooks = PipelineHooks('warns')\n"
        "log = logging.getLogger('robo_orchard_lab.other')\n"
        "hooks.on_loop.before(lambda args: log.warning('look out'))\n"
        f"make_trainer(hooks, max_step=1, run_folder={str(tmp_path)!r})()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("look out") == 1
    assert [e["text"] for e in events(tmp_path) if e["event"] == "warning"] == ["look out"]
