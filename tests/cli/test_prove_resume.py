"""Tests of the command ``prove-resume``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.spirals import write_experiment

from robo_orchard_lab.cli.main import main

FILE = "spirals.yaml"
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_resumes_exactly(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped three times, the run and its log equal an uninterrupted run; no file remains."""
    arguments = ["--stops", "3", "--steps", "13", "--file", "metrics.jsonl"]
    assert main(["prove-resume", FILE, *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("resumed exactly: 13 steps, stopped at 3, 6, 10; ")
    assert not (work / "runs").exists()


def test_nondeterministic_data_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Exits with 1 and names the first difference: the batch of the first step."""
    noise = ["--data.train.dataset={class_type: 'mine:Noise'}", "--trust", "mine"]
    arguments = ["prove-resume", FILE, *noise, "--steps", "4", "--stops", "1"]
    assert main(arguments) == 1
    assert "first difference: step 0: batch[0]" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["stops"]) == (False, [2])
    assert (found["differences"][0]["step"], found["differences"][0]["name"]) == (0, "batch[0]")


def test_a_short_run_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """A note says that the run ends before the stops."""
    assert main(["prove-resume", FILE, "--trainer.max_epoch=1", "--stops", "1"]) == 0
    assert "the run ends after 10 steps; pass --steps 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    "smaller",
    [
        [
            *("--steps", "4", "--data.train.batch_size", "8"),
            *("--data.train.dataset.random_images=32", "--data.evaluation.val=null"),
            *("--hooks.val=null", "--hooks.best=null", "--hooks.bar.metrics=[]"),
        ],
        pytest.param([], marks=pytest.mark.slow),
    ],
    ids=["small", "as it is"],
)
def test_the_digits_example_resumes_exactly(
    work: Path, smaller: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped three times, the example equals an uninterrupted run."""
    for name in ("digits.yaml", "digits_parts.py"):
        shutil.copy(DIGITS / name, work)
    arguments = ["digits.yaml", "--trust", "digits_parts", "--stops", "3", *smaller]
    assert main(["prove-resume", *arguments]) == 0
    assert "resumed exactly: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "missing argument 'FILE'"),
        ([FILE, "--stops", "0"], 2, "0 is not in the range x>=1"),
        ([FILE, "--kill", "--checkpoint=null"], 2, "must save, and checkpoint is null"),
        (["runs/x.yaml"], 2, "there is no file runs/x.yaml"),
        ([FILE, "--model.inputs=3"], 1, "the uninterrupted run"),
    ],
)
def test_a_proof_that_cannot_run_is_an_error(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage exits with 2; a failing run exits with 1 and prints its output."""
    assert main(["prove-resume", *arguments]) == code
    assert said in capsys.readouterr().err
