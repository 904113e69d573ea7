"""Tests of the commands ``evaluate``, ``test`` and ``predict``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.spirals import write_experiment

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

BEST = (
    "--hooks.best={class_type: KeepBest, monitor: eval/val/loss, mode: max, path: best.safetensors}"
)


TEST_SET = "--data.test.unseen={dataset: {class_type: Spirals, size: 21, seed: 2}, batch_size: 8}"
AVERAGE = "--hooks.average={class_type: EMA, decay: 0.5}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three epochs, which has kept the worst weights as the best."""
    folder = tmp_path_factory.mktemp("work")
    file = write_experiment(folder)
    assert (
        main(["train", str(file), "--run_folder", str(folder / "run"), BEST, TEST_SET, AVERAGE])
        == 0
    )
    return folder


@pytest.fixture(autouse=True)
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def found(
    capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "evaluate"
) -> dict[str, float]:
    capsys.readouterr()
    assert main([command, *arguments, "--json"]) == 0
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


def test_test_sets_are_evaluated_by_the_command_test(capsys: pytest.CaptureFixture[str]) -> None:
    """Training does not use data.test; the command does, with any weights of the run."""
    assert "eval/unseen/loss" not in Path("run/metrics.jsonl").read_text()
    own = found(capsys, "run", command="test")
    assert {*own} == {"eval/unseen/loss"}
    assert found(capsys, "run", "--set", "unseen") == own
    file = ("spirals.yaml", "--run_folder", "run", TEST_SET, AVERAGE)
    assert found(capsys, *file, command="test") == own
    both = found(capsys, "run", "--weights", "model", "--weights", "average", command="test")
    assert both["eval/unseen/model/loss"] == own["eval/unseen/loss"]
    averaged = found(capsys, "run", "--weights", "average", command="test")
    assert averaged == {"eval/unseen/loss": both["eval/unseen/average/loss"]} != own
    assert found(capsys, "run", "--best", command="test") != own
    assert found(capsys, "run", "--max-batches", "1", command="test") != own
    # Without data.test, the evaluation set of this name.
    evaluated = f"--data.evaluation.test={TEST_SET.partition('=')[2]}"
    as_before = found(capsys, "run", "--data.test=null", evaluated, command="test")
    assert as_before == {"eval/test/loss": own["eval/unseen/loss"]}


def test_test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the path of the weights and each metric."""
    assert main(["test", "run"]) == 0
    first, headings, line = capsys.readouterr().out.splitlines()
    assert (first, headings.split()) == ("run/checkpoints/step_00000030", ["METRIC", "VALUE"])
    assert line.startswith("eval/unseen/loss  ")


def test_predict_writes_each_sample_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """The file has each sample of a set once, also of the shuffled training set."""
    capsys.readouterr()
    assert main(["predict", "run", "--data", "train", "--out", "train.jsonl"]) == 0
    assert capsys.readouterr().out == (
        "train.jsonl: output of 80 samples by run/checkpoints/step_00000030\n"
    )
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [*range(80)]
    weights = load_file("run/checkpoints/step_00000030/model.safetensors")
    model = MLP(inputs=2, hidden=[8], outputs=3)
    model.load_state_dict({n.removeprefix("model."): value for n, value in weights.items()})
    expected = model(Spirals(80).points)
    torch.testing.assert_close(torch.tensor([line["output"] for line in lines]), expected.detach())
    limited = ["--max-batches", "2", "--weights", "average"]
    assert main(["predict", "run", "--data", "unseen", "--out", "a.npz", *limited]) == 0
    assert np.load("a.npz")["output"].shape == (16, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["test", "run", "--data.test=null"], "no test set\n       add data.test.NAME"),
        (["test", "run", "--weights", "averaged"], "hook 'averaged'; did you mean 'average'?"),
        (["test", "run", "--weights", "log"], "no weights of a hook 'log'"),
        (["test", "run", "--max-batches", "0"], "--max-batches"),
        (["test", "run", "--best", "--weights", "average"], "no weights of a hook 'average'"),
        (["test", "run", "--best", "--weights", "average"], "name a checkpoint of the run"),
        (["test", "run/checkpoints/last", "--best"], "name the run folder, or leave out the best"),
        (["predict", "run", "--out", "p.npz"], "missing option '--data'"),
        (
            ["predict", "run", "--data", "vall", "--out", "p.npz"],
            "there is no data set 'vall'; did you mean 'val'?",
        ),
        (["predict", "run", "--data", "val", "--out", "p.csv"], "ending in .jsonl, .npz"),
        (["predict", "nothing.yaml", "--data", "val", "--out", "p.npz"], "there is no nothing"),
        (
            ["evaluate", "run", "--hooks.validation.max_batches={vall: 2}"],
            "hooks.validation.max_batches.vall: ValidationHook.max_batches['vall']: there is no "
            "loader 'vall'",
        ),
        (
            ["evaluate", "run", "--data.test.val={dataset: {class_type: Spirals, size: 9}}"],
            "val: is an",
        ),
    ],
)
def test_mistakes_name_the_remedy(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown sets, weights, limits and files exit with 2, and write nothing."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert not [*Path().glob("p.*")]


@pytest.mark.parametrize(
    ("arguments", "line", "said"),
    [
        (
            ["--batch_processor={class_type: mine:Measured, says: []}"],
            "hooks:",
            "hooks.validation: there is nothing to measure on dataloaders['val']: Measured.ev",
        ),
        (
            [
                "--batch_processor={class_type: mine:Measured, says: [l1]}",
                "--hooks.best={class_type: KeepBest, monitor: eval/val/l2, mode: min, "
                "path: b.safetensors}",
            ],
            "",
            "--hooks.best: hooks.best.monitor: no hook is known to publish 'eval/val/l2'",
        ),
        (
            ["--hooks.validation.weights={ema: EMA}"],
            "",
            "hooks.validation.weights.ema: no hook",
        ),
        (["--hooks.validation.max_batches=0"], "", "hooks.validation.max_batches: expected a numb"),
        (["--hooks.validation.max_batches={x: 1}"], "", "['x']: there is no loader 'x'; expected"),
    ],
)
def test_training_refuses_mistakes_before_the_first_step(
    arguments: list[str], line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations without values, and unknown names, are errors with the place in the file."""
    capsys.readouterr()
    assert main(["train", "spirals.yaml", "--run_folder", "b", "--trust", "mine", *arguments]) != 0
    shown = capsys.readouterr().err
    assert said in shown
    if line:
        number = Path("spirals.yaml").read_text().splitlines().index(line) + 2
        assert f"spirals.yaml:{number}: " in shown
    assert not Path("b/checkpoints/step_00000010").exists()


@pytest.mark.parametrize("field", ["max_batches: {vall: 2}", "sets: [vall]"])
def test_an_unknown_set_in_a_variant_is_located_there(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is that of the variant's field, not that of the hook in its base."""
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path)
    variant = f"base: spirals.yaml\nhooks:\n  validation:\n    {field}\n"
    Path("variant.yaml").write_text(variant)
    capsys.readouterr()
    assert main(["train", "variant.yaml"]) == 2
    assert "error: variant.yaml:4: hooks.validation." in capsys.readouterr().err


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
