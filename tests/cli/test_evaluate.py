"""Tests of the command ``evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.spirals import write_experiment

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

BEST = (
    "--hooks.best={class_type: KeepBest, monitor: eval/val/loss, mode: max, path: best.safetensors}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three epochs, which has kept the worst weights as the best."""
    folder = tmp_path_factory.mktemp("work")
    file = write_experiment(folder)
    assert main(["train", str(file), "--run_folder", str(folder / "run"), BEST]) == 0
    return folder


@pytest.fixture(autouse=True)
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--json"]) == 0
    metrics: dict[str, float] = json.loads(capsys.readouterr().out)["metrics"]
    return metrics


def test_evaluate_reproduces_the_metrics_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The newest or the named checkpoint has the values that the run logged."""
    infos = CheckpointStore("run/checkpoints").list()
    assert found(capsys, "run") == dict(infos[-1].metrics)
    assert found(capsys, str(infos[0].path)) == dict(infos[0].metrics)
    worst = max(info.metrics["eval/val/loss"] for info in infos)
    assert found(capsys, "run", "--best") == {"eval/val/loss": worst}


def test_metrics_are_printed_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the path of the weights and each metric."""
    assert main(["evaluate", "run", "--set", "val"]) == 0
    first, headings, line = capsys.readouterr().out.splitlines()
    assert first == "run/checkpoints/step_00000030"
    assert headings.split() == ["METRIC", "VALUE"]
    assert line.startswith("eval/val/loss  ")


def test_fields_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    """Other sets and batch sizes are evaluated; the config of the run stays unchanged."""
    before = Path("run/config.yaml").read_bytes()
    other = "--data.evaluation.more={dataset: {class_type: Spirals, seed: 2}, batch_size: 100}"
    metrics = found(capsys, "run", other, "--data.evaluation.val.batch_size=1")
    assert metrics.keys() == {"eval/val/loss", "eval/more/loss"}
    assert Path("run/config.yaml").read_bytes() == before
    assert len([*Path("run/starts").glob("*.json")]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "missing argument"),
        (["runs"], 2, "there is no runs; expected a run folder"),
        (["run", "--set", "vall"], 2, "did you mean 'val'"),
        (["run", "--model.hidden=[9]"], 1, "has the weights of another model"),
        (
            ["run", "--hooks.best=null", "--best"],
            2,
            "the best weights of run are unknown",
        ),
        (["run", "--run_folder", "x"], 2, "--run_folder names another folder"),
    ],
)
def test_wrong_usage_is_an_error(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage exits with 2, and weights of another model with 1."""
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
