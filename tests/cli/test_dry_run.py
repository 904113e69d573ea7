"""Tests of ``train --dry-run`` and ``train --debug-fast``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cli.spirals import write_experiment

from robo_orchard_lab.cli.main import main

FILE = "spirals.yaml"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_describes_the_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows length, hooks and memory of the run; writes nothing."""
    before = {*work.rglob("*")}
    assert main(["train", FILE, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = {line[:12].strip(): line[13:] for line in lines}
    assert printed["run folder"] == "runs/spirals"
    assert printed["start"] == "new run"
    assert printed["model"] == "51 parameters"
    assert printed["epoch"] == "10 steps"
    assert printed["run"] == "3 epochs, 30 steps, 30 updates"
    assert printed["memory"].startswith("parameters 204 B, gradients 204 B, optimizer 204 B; peak ")
    assert [line.split() for line in lines if line.startswith("validation")] == [
        ["validation", "every", "1", "epoch", "3"]
    ]
    assert lines[-1] == "nothing was written"
    assert {*work.rglob("*")} == before
    assert main(["train", FILE, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["length"] == {"epochs": 3, "steps": 30, "updates": 30, "steps_per_epoch": 10}
    assert {hook["hook"]: hook["times"] for hook in found["hooks"]} == {
        **{"validation": 3, "log": 6, "checkpoint": 3}
    }


def test_a_dry_run_shows_the_step_to_resume_from(capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint of an existing run is shown, unless a resume would be refused."""
    assert main(["train", FILE, "--trainer.max_epoch=1"]) == 0
    capsys.readouterr()
    assert main(["train", FILE, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()[1].split(maxsplit=1)
    assert printed == [
        "start",
        "resumes the run in this folder at step 10, with changed trainer.max_epoch",
    ]
    assert main(["train", FILE, "--dry-run", "--seed=3"]) == 2
    assert "can't resume with changed seed" in capsys.readouterr().err
    assert main(["train", FILE, "--dry-run", "--seed=3", "--resume=never"]) == 0


def test_a_fast_run_lists_its_stages(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps are trained, evaluated, saved and resumed; no file remains."""
    before = {*work.rglob("*")}
    assert main(["train", FILE, "--debug-fast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trained to step 2 (epoch 1")
    assert lines[1].startswith("found eval/val/loss = ")
    assert lines[-2:] == ["saved, and resumed from step 2 to 3", "nothing was kept"]
    assert {*work.rglob("*")} == before
    assert main(["train", FILE, "--debug-fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"][0].startswith("trained to step 2")


@pytest.mark.parametrize("option", ["--dry-run", "--debug-fast"])
def test_errors_of_dry_runs_are_printed(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken component, a failing component and several processes end with an error."""
    assert main(["train", FILE, option, "--model.hidden=[0]"]) == 2
    assert "model: " in capsys.readouterr().err
    assert main(["train", FILE, option, "--model.inputs=3"]) == 1
    printed = capsys.readouterr().err
    assert re.search("RuntimeError: (addmm: )?mat1 and mat2 shapes", printed)  # torch 2.15: addmm
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", FILE, option]) == 2
    assert f"{option} is for one process" in capsys.readouterr().err
