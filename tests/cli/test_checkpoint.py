"""Tests of the commands ``checkpoint list|show|verify|export|prune``."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tests.cli.running import START, run, run_in_terminal
from tests.cli.spirals import EXPERIMENT

from robo_orchard_lab.cli.commands.checkpoint import checkpoint as group
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.pipeline import SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, FiniteCheck, Retention
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.policy import load_policy
from robot_data import ACTION, STATE, write_dataset
from tiny import make_trainer


class Nothing(SimpleBatchProcessor):
    """Loss that changes nothing."""

    def __init__(self) -> None:
        super().__init__(need_backward=True)

    def forward(self, model: Any, batch: Any) -> tuple[None, torch.Tensor]:
        return None, 0 * sum(parameter.sum() for parameter in model.parameters())


SUBCOMMANDS = ["list", "show", "verify", "export", "prune"]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with four checkpoints, of which that of step 20 is the best."""
    folder = tmp_path_factory.mktemp("run")
    retention = Retention(keep_best=1, monitor="loss")
    with CheckpointStore(folder / "checkpoints", retention=retention) as store:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0)):
            weights = {"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)}
            progress = {"version": 1, "epoch_id": step // 20, "global_step_id": step}
            parts = {"model": weights, "trainer": {"progress": progress}}
            about = {"command": "train.py \x1b[31m", "reason": "every 10 steps"}
            store.save(step, parts, metrics={"loss": loss}, metadata=about)
    text = "checkpoint: {keep_last: 3, keep_best: 1, monitor: loss, mode: min}\n"
    (folder / "config.yaml").write_text(text)
    (folder / "starts").mkdir()
    return folder


@pytest.fixture
def kept(kept_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, named by a relative path."""
    shutil.copytree(kept_run, tmp_path / "runs" / "first", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/first")


def damage(run_folder: Path, step: int) -> None:
    """Change a byte of the weights, and nothing of the size."""
    file = run_folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help of a command shows its usage, its purpose and its options."""
    assert main(["checkpoint", name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: robo-orchard-lab checkpoint {name}")
    command = group.commands[name]
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert [*group.list_commands(click.Context(group))] == SUBCOMMANDS


def test_help_does_not_import_torch() -> None:
    """The process that prints help has not imported torch."""
    done = run("checkpoint", "list", "--help", variables={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.code == 0
    assert "| torch" not in done.err


def test_list_shows_each_checkpoint(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row has step, epoch, size, age, state and metrics of a checkpoint."""
    assert main(["checkpoint", "list", str(kept)]) == 0
    headings, *lines = capsys.readouterr().out.splitlines()
    assert headings.split() == ["STEP", "EPOCH", "SIZE", "SAVED", "STATE", "METRICS"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40"]
    assert [line.split()[1] for line in lines] == ["0", "1", "1", "2"]
    assert "complete, best" in lines[1]
    assert "complete, last" in lines[3]
    assert lines[3].endswith("loss 4")


def test_list_shows_both_links_of_a_checkpoint(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint that is also the best one is listed as both."""
    best = kept / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step_00000040")
    assert main(["checkpoint", "list", str(kept)]) == 0
    assert "complete, best, last" in capsys.readouterr().out.splitlines()[-1]


def test_list_shows_damaged_checkpoints(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The list shows a truncated file and an invalid manifest."""
    root = kept / "checkpoints"
    file = root / "step_00000010" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (root / "step_00000030" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(root), "--json"]) == 0
    found = {Path(each["path"]).name: each for each in json.loads(capsys.readouterr().out)}
    size = file.stat().st_size
    expected = f"model.safetensors: expected {size + 1} bytes, found {size}"
    assert expected in found["step_00000010"]["problem"]
    assert found["step_00000020"]["problem"] is None
    assert "not a manifest: expected the format" in found["step_00000030"]["problem"]
    assert main(["checkpoint", "list", str(root)]) == 0
    assert "damaged: " in capsys.readouterr().out


def test_show_prints_the_contents(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints step, command and files of the newest checkpoint; every tensor with --tensors."""
    assert main(["checkpoint", "show", str(kept), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "step:        40" in shown
    assert "command:     train.py \\x1b[31m" in shown  # which a terminal would obey
    assert "2 tensors, 8 elements" in shown
    assert "model.safetensors  weight  float32  [2, 3]" in shown
    assert main(["checkpoint", "show", str(kept), "--best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["metrics"]) == (20, {"loss": 1.0})
    [model] = [file for file in found["files"] if file["part"] == "model"]
    assert {tensor["name"] for tensor in model["tensors"]} == {"weight", "bias"}


def test_verify_finds_a_changed_byte(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exits with 0 if all are intact, and with 1 and the file name for a changed byte."""
    assert main(["checkpoint", "verify", str(kept)]) == 0
    assert capsys.readouterr().out.count(": intact") == 4
    damage(kept, 30)
    assert main(["checkpoint", "verify", str(kept), "--json"]) == 1
    problems = [each["problem"] for each in json.loads(capsys.readouterr().out)]
    assert [problem is None for problem in problems] == [True, True, False, True]
    assert main(["checkpoint", "verify", str(kept / "checkpoints" / "last")]) == 0
    assert main(["checkpoint", "verify", str(kept / "checkpoints" / "step_00000030")]) == 1
    assert "step_00000030/model.safetensors: its digest is" in capsys.readouterr().out


def test_export_writes_plain_safetensors(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exports the newest intact, the best, or the named checkpoint as plain safetensors."""
    assert main(["checkpoint", "export", str(kept)]) == 0
    assert "step_00000040 to model.safetensors" in capsys.readouterr().out
    assert load_file("model.safetensors")["weight"].eq(40).all()
    for path, options, step in (
        (kept, ["--best"], 20),
        (kept / "checkpoints/step_00000010", [], 10),
    ):
        assert (
            main(["checkpoint", "export", str(path), "other.safetensors", "--force", *options]) == 0
        )
        assert load_file("other.safetensors")["weight"].eq(step).all()


def test_export_writes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder has the plain weights and a card with results and license; a card needs a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spirals.yaml").write_text(EXPERIMENT)
    assert main(["train", "spirals.yaml"]) == 0
    command = ["checkpoint", "export", "runs/spirals", "out", "--license", "mit", "--tag", "toy"]
    assert main(command) == 0
    assert "wrote the model of runs/spirals/checkpoints/step_00000030 to out" in (
        capsys.readouterr().out
    )
    saved = load_file("runs/spirals/checkpoints/last/model.safetensors")
    exported = load_file("out/model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    card = ModelCard.load(Path("out/README.md"))
    assert (card.data.license, card.data.model_name) == ("mit", "spirals")
    assert card.data.eval_results[0].metric_name == "loss"
    assert "samples.MLP` with " in card.text
    assert main(command) == 2
    assert "out already exists" in capsys.readouterr().err
    Path("out/mine.txt").write_text("mine")
    assert main([*command, "--force", "--name", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "out"
    assert sorted(os.listdir("out")) == ["README.md", "mine.txt", "model.safetensors"]
    assert main(["checkpoint", "export", "runs/spirals", "w.safetensors", "--license", "mit"]) == 2
    assert "w.safetensors has no model card" in capsys.readouterr().err
    assert main(["checkpoint", "export", "runs/spirals", "new", "--license", "M I T"]) == 2
    assert "license: expected an identifier such as apache-2.0" in capsys.readouterr().err
    assert not os.path.exists("new")


MODEL = """
import transformers


def make() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=7, n_positions=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)
"""


def test_export_uses_save_pretrained_of_a_trusted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of a user is built with --trust only, and from_pretrained reads the folder."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_gpt.py").write_text(MODEL)
    model = sys.modules.get("my_gpt") or importlib.import_module("my_gpt")
    trained = model.make()
    make_trainer(
        SaveCheckpointConfig(), model=trained, batch_processor=Nothing(), max_step=1, run_folder="r"
    )()
    config = EXPERIMENT.replace(
        "model: {class_type: MLP, inputs: 2, hidden: [8], outputs: 3}",
        "model: {func: 'my_gpt:make'}",
    )
    Path("r/config.yaml").write_text(config)
    Path("r/starts").mkdir()
    assert main(["checkpoint", "export", "r", "out"]) == 2
    assert "my_gpt" in capsys.readouterr().err
    assert main(["checkpoint", "export", "r", "out", "--trust", "my_gpt"]) == 0
    loaded = transformers.GPT2LMHeadModel.from_pretrained("out").state_dict()
    assert all(torch.equal(loaded[n], value) for n, value in trained.state_dict().items())


def test_export_of_a_policy_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy with values of its dataset is exported with a config that load_policy reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data" / "d", (5, 4), {"observation.state": STATE, "action": ACTION})
    (tmp_path / "bc.yaml").write_text(POLICY)
    assert main(["train", "bc.yaml"]) == 0
    assert main(["checkpoint", "export", "runs/bc", "policy"]) == 0
    policy = load_policy("policy")
    saved = load_file("runs/bc/checkpoints/last/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in policy.state_dict().items())
    assert ModelCard.load(Path("policy/README.md")).data.pipeline_tag == "robotics"


POLICY = """
name: bc
model: {class_type: BehaviorCloning, statistics: {from_data: statistics}, hidden: [8]}
data:
  train:
    dataset: {class_type: LeRobotDataset, folder: data/d, chunk_size: 8}
    batch_size: 4
batch_processor: {class_type: PolicyProcessor}
optimizer: {class_type: "torch.optim:SGD", lr: 0.01}
trainer: {max_step: 1}
"""


def test_poisoned_checkpoints_are_named_and_skipped(
    kept: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Commands name non-finite weights, export the newest healthy ones, and never prune them."""
    finite = FiniteCheck(lambda name: name.startswith("model/"))
    with CheckpointStore(kept / "checkpoints") as store:
        for step, value in ((50, 5.0), (60, float("nan")), (70, float("nan"))):
            parts = {"model": {"weight": torch.full((2,), value)}}
            store.save(step, parts, metrics={"loss": 0.1}, finite=finite)
    assert main(["checkpoint", "list", str(kept)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["not finite: model/weight" in line for line in lines[1:]] == [False] * 5 + [True] * 2
    assert main(["checkpoint", "list", str(kept), "--json"]) == 0
    found = {each["step"]: each["non_finite"] for each in json.loads(capsys.readouterr().out)}
    assert (found[40], found[50], found[60]) == (None, [], ["model/weight"])
    for step, text in ((40, "unknown: it was not checked"), (50, "yes"), (60, "not model/weight")):
        assert main(["checkpoint", "show", str(kept / f"checkpoints/step_{step:08d}")]) == 0
        assert f"finite:      {text}" in capsys.readouterr().out
    assert main(["checkpoint", "export", str(kept)]) == 0
    assert load_file("model.safetensors")["weight"].eq(5).all()
    assert "step_00000070: it has non-finite values in model/weight" in caplog.text
    assert main(["checkpoint", "prune", str(kept), "--keep-last", "1"]) == 0
    left = [info.step for info in CheckpointStore(kept / "checkpoints").list()]
    assert left == [50, 70]  # 50 also is the best


def test_export_skips_a_damaged_checkpoint(kept: Path) -> None:
    """A damaged newest checkpoint is skipped; a damaged named checkpoint is an error."""
    damage(kept, 40)
    assert main(["checkpoint", "export", str(kept)]) == 0
    assert load_file("model.safetensors")["weight"].eq(30).all()
    named = str(kept / "checkpoints" / "step_00000040")
    assert main(["checkpoint", "export", named, "other.safetensors"]) == 1
    assert not os.path.exists("other.safetensors")


def test_a_checkpoint_does_not_need_the_config_of_its_run(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A named checkpoint is read and exported even if config.yaml of its run is invalid."""
    (kept / "config.yaml").write_text("seed: [")
    named = str(kept / "checkpoints" / "last")
    assert main(["checkpoint", "export", named]) == 0
    assert load_file("model.safetensors")["weight"].eq(40).all()
    assert main(["checkpoint", "list", str(kept / "checkpoints")]) == 0


def test_the_checkpoint_folder_is_that_of_the_config(kept: Path) -> None:
    """The checkpoints may be in another folder of the run."""
    (kept / "checkpoints").rename(kept / "saved")
    assert main(["checkpoint", "verify", str(kept)]) == 2
    (kept / "config.yaml").write_text("checkpoint: {folder: saved}")
    assert main(["checkpoint", "verify", str(kept)]) == 0


@pytest.fixture
def script_run(kept: Path) -> Path:
    """The run folder of a script: without a configuration file, with a quarantine."""
    (kept / "config.yaml").unlink()
    (kept / "starts").rmdir()
    shutil.copytree(kept / "checkpoints" / "step_00000010", kept / "quarantine" / "step_00000007")
    return kept


@pytest.mark.parametrize("name", ["checkpoints", "saved"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_run_of_a_script_is_accepted(
    inside: bool, name: str, script_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command takes the folder of a script's run, and the folder of checkpoints inside."""
    (script_run / "checkpoints").rename(script_run / name)
    path = str(script_run / name if inside else script_run)
    assert main(["checkpoint", "list", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in found] == [
        str(script_run / name / f"step_{step:08d}") for step in (10, 20, 30, 40)
    ]
    assert main(["checkpoint", "show", path]) == 0
    assert main(["checkpoint", "verify", path]) == 0
    assert main(["checkpoint", "export", path, "weights.safetensors"]) == 0
    assert load_file("weights.safetensors")["weight"][0, 0] == 40
    assert main(["checkpoint", "prune", path, "--keep-last", "2", "--yes"]) == 0
    assert len([*(script_run / name).glob("step_*")]) == 2


def test_the_run_of_a_script_without_checkpoints_is_reported(
    script_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the folder with the checkpoints, or says that there are none."""
    make_trainer([], max_step=1, run_folder="runs/new")()
    assert main(["checkpoint", "list", "runs/new"]) == 2
    assert "found a run without: there are none in runs/new" in capsys.readouterr().err
    save = SaveCheckpointConfig(folder=Path("elsewhere"))
    make_trainer([save], max_step=1, run_folder="runs/apart")()
    assert main(["checkpoint", "list", "runs/apart"]) == 2
    assert f"they are in {Path('elsewhere').absolute()}; name that" in capsys.readouterr().err
    shutil.copytree(script_run / "checkpoints", script_run / "more", symlinks=True)
    assert main(["checkpoint", "prune", str(script_run), "--keep-last", "1"]) == 2
    assert "expected one folder of checkpoints" in capsys.readouterr().err


def test_prune_uses_the_rules_of_the_run(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options override the rules of the run; a dry run removes nothing."""
    assert main(["checkpoint", "prune", str(kept), "--keep-last", "1", "--dry-run", "--json"]) == 0
    found = {Path(d["path"]).name[-2:]: d["removed"] for d in json.loads(capsys.readouterr().out)}
    assert found == {"10": True, "20": False, "30": True, "40": False}
    assert len([*(kept / "checkpoints").glob("step_*")]) == 4
    assert main(["checkpoint", "prune", str(kept)]) == 0
    shown = capsys.readouterr().out
    assert "step_00000010  removed  no rule keeps it" in shown
    assert "number 1 by loss" in shown
    assert sorted(path.name[-2:] for path in (kept / "checkpoints").glob("step_*")) == [
        *("20", "30", "40")
    ]


@pytest.mark.parametrize(
    ("options", "problem", "advice"),
    [
        ("--keep-best 1 --monitor los", "has the metric 'los'", "did you mean 'loss'?"),
        ("--keep-best 1 --monitor speed", "has the metric 'speed'", "checkpoints: accuracy, loss"),
        ("--keep-best 1 --monitor accuracy", "or the largest accuracy is the best", "--mode max"),
    ],
)
def test_prune_refuses_an_unclear_best(
    kept: Path, options: str, problem: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metric must be in a checkpoint, and its mode be given; nothing is removed."""
    with CheckpointStore(kept / "checkpoints") as store:
        weights = {"model": {"weight": torch.zeros(2)}}
        store.save(50, weights, metrics={"accuracy": 0.5, "loss": 5.0})
    arguments = ["checkpoint", "prune", str(kept), "--keep-last", "1", "--yes", *options.split()]
    before = sorted(os.listdir(kept / "checkpoints"))
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert problem in shown
    assert advice in shown
    assert sorted(os.listdir(kept / "checkpoints")) == before
    assert main([*arguments, "--monitor", "accuracy", "--mode", "max"]) == 0


def test_prune_uses_the_mode_of_the_run(kept: Path) -> None:
    """The run's file says which loss is best; without the file, --mode is needed."""
    arguments = ["checkpoint", "prune", str(kept), *["--keep-last", "1", "--keep-best", "1"]]
    arguments += ["--monitor", "loss"]
    (kept / "config.yaml").rename(kept / "aside.yaml")
    root = ["checkpoint", "prune", str(kept / "checkpoints"), *arguments[3:]]
    assert main(root) == 2
    (kept / "aside.yaml").rename(kept / "config.yaml")
    assert main(arguments) == 0
    left = sorted(path.name[-2:] for path in (kept / "checkpoints").glob("step_*"))
    assert left == ["20", "40"]


def test_prune_needs_a_yes_in_a_terminal(kept: Path) -> None:
    """A person sees the list first; scripts need no answer."""
    arguments = ("checkpoint", "prune", str(kept), "--keep-last", "1")
    shown = run_in_terminal(*arguments)
    assert shown.code == 0
    assert "would be removed" in shown.out
    assert "nothing was removed; pass --yes to remove these checkpoints" in shown.out
    assert len([*(kept / "checkpoints").glob("step_*")]) == 4
    assert run_in_terminal(*arguments, "--yes").code == 0
    assert len([*(kept / "checkpoints").glob("step_*")]) == 2


def test_prune_refuses_a_running_run(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is removed while another process writes there."""
    with CheckpointStore(kept / "checkpoints"):
        assert main(["checkpoint", "prune", str(kept), "--keep-last", "1"]) == 1
    assert "is locked by process" in capsys.readouterr().err
    assert len([*(kept / "checkpoints").glob("step_*")]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "runs/second"], "there is no runs/second; expected a run folder"),
        (["list", "."], "not a run folder: it has no config.yaml"),
        (["show"], "missing argument 'PATH'"),
        (["prune", "runs/first/checkpoints", "--keep-last", "0"], "0 is not in the range x>=1"),
        (["export", "runs/first", "model.bin"], "expected a name that ends in .safetensors"),
        (["export", "runs/first", "nowhere/model.safetensors"], "there is no folder nowhere"),
        (["export", "runs/first", "there.safetensors"], "there.safetensors already exists"),
        (
            ["export", "runs/plain", "--best"],
            "no checkpoint in runs/plain/checkpoints is known as the",
        ),
        (["prune", "runs/plain"], "no rule says how many checkpoints"),
        (["list", "runs/empty"], "the run in runs/empty has no checkpoints"),
        (["list", "runs/broken"], "runs/broken/config.yaml"),
        (["prune", "runs/outside"], "checkpoint.folder: expected a path within the run folder"),
        (["list", "runs/number"], "checkpoint.folder: expected a path within the run folder"),
        (["lst", "runs/first"], "there is no command 'lst'; did you mean 'list'?"),
    ],
)
def test_wrong_usage_exits_with_2(
    kept: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what was expected; standard output stays empty."""
    Path("there.safetensors").write_bytes(b"")
    shutil.copytree(kept, "runs/plain", ignore=shutil.ignore_patterns("best"), symlinks=True)
    Path("runs/plain/config.yaml").write_text("checkpoint: {}\n")
    for name, text in (
        ("empty", "seed: 0\n"),
        ("broken", "seed: [\n"),
        ("outside", "checkpoint: {folder: ../first/checkpoints, keep_last: 1}\n"),
        ("number", "checkpoint: {folder: 3}\n"),
    ):
        Path("runs", name, "starts").mkdir(parents=True)
        Path("runs", name, "config.yaml").write_text(text)
    assert main(["checkpoint", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err


@pytest.mark.parametrize("name", ["list", "verify", "prune"])
@pytest.mark.parametrize("elsewhere", ["absolute", "above", "link", "inner_link", "number"])
def test_the_config_of_a_run_cannot_name_checkpoints_of_another_run(
    kept: Path, name: str, elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config from a stranger cannot make a command read or remove other checkpoints."""
    stranger = Path("stranger")
    Path(stranger, "starts").mkdir(parents=True)
    folder = {
        "absolute": str((kept / "checkpoints").absolute()),
        "above": "../runs/first/checkpoints",
        "inner_link": "away/checkpoints",
        "number": 3,
    }.get(elsewhere)
    if elsewhere == "link":
        (stranger / "checkpoints").symlink_to((kept / "checkpoints").absolute())
    (stranger / "away").symlink_to(kept.absolute())
    policy = {"keep_last": 1} | ({} if folder is None else {"folder": folder})
    (stranger / "config.yaml").write_text(json.dumps({"checkpoint": policy}))
    before = sorted(os.listdir(kept / "checkpoints"))
    assert main(["checkpoint", name, str(stranger)]) == 2
    assert "checkpoint.folder" in capsys.readouterr().err
    assert sorted(os.listdir(kept / "checkpoints")) == before


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="without it, root reads everything")
@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoint", "list", "runs/first"],
        ["checkpoint", "export", "runs/first", "w.safetensors"],
        ["resume", "runs/first"],
        ["train", "experiment.yaml", "--run_folder", "runs/first"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_folder_without_permission_is_an_error_of_one_line(
    arguments: list[str], kept: Path
) -> None:
    """The error names the path and a command that shows the permissions."""
    main(["config", "init"])
    kept.parent.chmod(0)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [*(drop if os.geteuid() == 0 else []), *START, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        kept.parent.chmod(0o700)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: no permission to read or write runs/first")
    assert "`namei -l runs/first" in line


def test_text_of_a_checkpoint_forges_no_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line ends and terminal codes in names, counters and metadata stay within their line."""
    forged = "x\nstep: 999\r\x1b[2J\u2028step: 999"
    weights = {forged: torch.zeros(2)}
    trainer = {"progress": {"epoch_id": forged, "global_step_id": 1}}
    about = {"reason": forged, "command": forged, "versions": {forged: forged}}
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"model": weights, "trainer": trainer}, metrics={forged: 1.0}, metadata=about)
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "step_00000002" / "manifest.json").write_text(json.dumps({forged: 1}))
    for command in (["list"], ["show", "--tensors"], ["verify"]):
        assert main(["checkpoint", *command, str(tmp_path)]) in (0, 1)
        shown = "".join(capsys.readouterr())
        assert shown.count("step:") > 0 or command == ["verify"]
        for line in shown.splitlines():
            assert line.isprintable()
            assert not line.lstrip().startswith("step: 999")
