"""Values of a file that depend on the run or on the data: ``auto``, ``from_data``, functions."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.dry_run import fast_run
from robo_orchard_lab.experiment.evaluation import evaluate
from robo_orchard_lab.experiment.from_data import read_value
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.experiment.inspection import build_hook_set
from robo_orchard_lab.experiment.overrides import from_arguments

TEAM = '''
import torch
from torch.optim.lr_scheduler import LambdaLR
from robo_orchard_lab.experiment.samples import MLP, Spirals

def warmup(step, warmup_steps: int, total: int = 1):
    return min(1.0, (step + 1) / warmup_steps) * (1 - step / total)

def get_linear_schedule(optimizer, num_warmup_steps: int, num_training_steps: int):
    """As in Transformers: without a return annotation."""
    return LambdaLR(optimizer, lambda step: step / num_training_steps)

def wrong_schedule(optimizer, steps: int):
    return steps

def make_mlp(inputs: int, outputs: int, widths: list[int]) -> MLP:
    return MLP(inputs, widths, outputs)

def start_worker(worker: int) -> None:
    torch.randn(1)

class Labelled(Spirals):
    def __init__(self, size: int, seed: int = 0):
        super().__init__(size, seed=seed)
        self.classes = ["a", "b", "c"]
        self.statistics = {"x": {"mean": torch.tensor([0.5, 1.5])}, "widths": (8, 4)}
'''


@pytest.fixture(autouse=True)
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's module, in the current folder."""
    (tmp_path / "values_team.py").write_text(TEAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("values_team", None)


def document(**fields: Any) -> dict[str, Any]:
    dataset = {"class_type": "values_team:Labelled", "size": 12}
    return {
        "model": {"class_type": "MLP", "inputs": 2, "hidden": [4], "outputs": 3},
        "data": {"train": {"dataset": dataset, "batch_size": 4}},
        "batch_processor": {
            "class_type": "SupervisedProcessor",
            "loss": {"class_type": "torch.nn:CrossEntropyLoss"},
        },
        "optimizer": {"class_type": "torch.optim:SGD", "lr": 0.1},
        "trainer": {"max_epoch": 2},
        **fields,
    }


def load(**fields: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict(document(**fields), trust="values_team")


def lr_scheduler_of(described: dict[str, Any]) -> Any:
    return load(lr_scheduler=described).build().lr_scheduler


def test_auto_in_a_function_that_makes_an_lr_scheduler() -> None:
    """A function without a return annotation gets the optimizer and the number of steps."""
    made = lr_scheduler_of(
        {
            "func": "values_team:get_linear_schedule",
            "num_warmup_steps": 0,
            "num_training_steps": "auto",
            "every": "optimizer_step",
        }
    )
    assert [made.lr_lambdas[0](step) for step in (3, 6)] == [0.5, 1.0]


def test_auto_in_the_function_of_a_lambda_lr() -> None:
    """Integer parameters of an inner function may be auto, at any depth."""
    factor = {"func": "values_team:warmup", "warmup_steps": 2, "total": "auto"}
    made = lr_scheduler_of(
        {
            "class_type": "torch.optim.lr_scheduler:SequentialLR",
            "schedulers": [
                {"class_type": "torch.optim.lr_scheduler:ConstantLR"},
                {"class_type": "torch.optim.lr_scheduler:LambdaLR", "lr_lambda": factor},
            ],
            "milestones": [2],
        }
    )
    (_, inner) = made._schedulers
    assert inner.lr_lambdas[0](3) == 0.5


def test_options_give_a_function_to_an_lr_scheduler(tmp_path: Path) -> None:
    """A part among the arguments of a class of the same command is no named LR scheduler."""
    options = [
        *("--lr_scheduler.lr_lambda.func", "values_team:warmup"),
        *("--lr_scheduler.lr_lambda.warmup_steps", "2", "--lr_scheduler.lr_lambda.total", "auto"),
        *("--lr_scheduler.class_type", "torch.optim.lr_scheduler:LambdaLR"),
    ]
    load().save(tmp_path / "plain.yaml")
    overrides = from_arguments(options)[0]
    made = ExperimentConfig.load(tmp_path / "plain.yaml", overrides=overrides, trust="values_team")
    assert made.build().lr_scheduler.lr_lambdas[0](3) == 0.5  # type: ignore[union-attr]  # a LambdaLR


def test_functions_of_lr_schedulers_round_trip() -> None:
    """``auto`` stays in the document, in which ``every`` is a field of the LR scheduler."""
    described = {
        "func": "values_team:get_linear_schedule",
        "num_warmup_steps": 1,
        "num_training_steps": "auto",
        "every": "epoch",
    }
    experiment = load(lr_scheduler=described)
    again = ExperimentConfig.from_dict(experiment.to_dict(), trust="values_team")
    assert again == experiment
    assert experiment.to_dict()["lr_scheduler"] == described
    assert experiment.build().lr_scheduler.lr_lambdas[0](1) == 0.5  # type: ignore[union-attr]  # a LambdaLR


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"lr_scheduler": {"func": "values_team:wrong_schedule", "steps": "auto"}},
            "lr_scheduler: expected an LR scheduler from 'values_team:wrong_schedule', found 6",
        ),
        (
            {"lr_scheduler": {"func": "values_team:start_worker"}},
            "a function that returns a LRScheduler by its return annotation",
        ),
        (
            {"model": {"class_type": "MLP", "inputs": "auto", "hidden": [], "outputs": 1}},
            "model.inputs: expected an integer; auto is for the parameters of lr_scheduler",
        ),
        (
            {"optimizer": {"class_type": "torch.optim:SGD", "lr": {"from_data": "classes.len"}}},
            "optimizer.lr: from_data is for model, batch_processor, hooks",
        ),
        (
            {"trainer": {"max_epoch": {"from_data": "size"}}},
            "trainer.max_epoch",
        ),
        (
            {"model": {"class_type": "MLP", "inputs": {"from_data": "_size"}, "outputs": 1}},
            "model.inputs.from_data: expected a public name",
        ),
        (
            {"model": {"class_type": "MLP", "inputs": {"from_data": 3}, "outputs": 1}},
            "model.inputs.from_data: expected a name such as num_classes or classes.len, found 3",
        ),
        (
            {"model": {"class_type": "MLP", "inputs": {"from_data": "x", "set": "a"}}},
            "model.inputs.set: from_data has no such field",
        ),
    ],
)
def test_values_in_a_wrong_place_are_refused(fields: dict[str, Any], problem: str) -> None:
    """The error has the path of the value."""
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(**fields).build()


MODEL = {
    "func": "values_team:make_mlp",
    "inputs": {"from_data": "statistics.x.mean.shape.0"},
    "outputs": {"from_data": "classes.len"},
    "widths": {"from_data": "statistics.widths"},
}
METRIC = {
    "class_type": "torchmetrics.classification:MulticlassAccuracy",
    "num_classes": {"from_data": "classes.len", "dataset": "val"},
}
VALIDATED = {
    "data": {
        "train": {"dataset": {"class_type": "values_team:Labelled", "size": 12}, "batch_size": 4},
        "evaluation": {"val": {"dataset": {"class_type": "values_team:Labelled", "size": 6}}},
    },
    "hooks": {"val": {"class_type": "ValidationHook", "metrics": {"accuracy": METRIC}}},
}


def test_a_model_depends_on_the_data(tmp_path: Path) -> None:
    """Sizes come from the datasets, also for hooks and in an evaluation; the file keeps names."""
    experiment = load(model=MODEL, run_folder=str(tmp_path / "run"), **VALIDATED)
    assert experiment.to_dict()["model"]["outputs"] == {"from_data": "classes.len"}
    built = experiment.build()
    assert [layer.weight.shape for layer in built.model.modules() if hasattr(layer, "weight")] == [
        (8, 2),
        (4, 8),
        (3, 4),
    ]
    built.trainer()
    assert "ValidationHook" in str(build_hook_set(experiment))
    assert fast_run(experiment)[-1] == "saved, and resumed from step 2 to 3"
    saved = SavedWeights.from_checkpoint(tmp_path / "run/checkpoints/last")
    assert {"eval/val/loss", "eval/val/accuracy"} <= evaluate(experiment, saved).keys()


def test_an_evaluation_builds_only_the_datasets_that_it_needs(tmp_path: Path) -> None:
    """A value of an evaluation set needs neither the training data nor the other sets."""
    outputs = {"from_data": "classes.len", "dataset": "val"}
    val = {"class_type": "values_team:Labelled", "size": 6}
    absent = {"class_type": "values_team:Labelled", "size": -1}
    fields = document(model={"class_type": "MLP", "inputs": 2, "hidden": [], "outputs": outputs})
    fields["data"] |= {"evaluation": {"val": {"dataset": val}}}
    experiment = ExperimentConfig.from_dict(fields, trust="values_team")
    model = experiment.build(run_folder=tmp_path / "run").model
    fields["data"] = {"train": None, "evaluation": {"val": {"dataset": val}}}
    fields["data"]["evaluation"]["absent"] = {"dataset": absent}
    saved = SavedWeights(tmp_path, model.state_dict())
    experiment = ExperimentConfig.from_dict(fields, trust="values_team")
    assert [*evaluate(experiment, saved, ["val"])] == ["eval/val/loss"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("clashes.len", "Labelled has no 'clashes'; did you mean 'classes'?"),
        ("classes.9", "list has no '9'; it has 3 entries"),
        ("statistics.y", "dict has no 'y'; it has x, widths"),
        ("statistics.x", "expected numbers, text, lists or mappings"),
        ("statistics.widths", "valid integer"),
    ],
)
def test_missing_values_of_the_data_are_errors_with_the_line(
    tmp_path: Path, value: str, problem: str
) -> None:
    """The error names the dataset's class, the file and the line, before the first step."""
    file = tmp_path / "file.json"
    fields = document(model={**MODEL, "outputs": {"from_data": value}})
    ExperimentConfig.from_dict(fields, trust="values_team").save(file)
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        ExperimentConfig.load(file, trust="values_team").build()
    assert "model.outputs" in str(refused.value)
    assert str(refused.value).startswith(f"{file}")


def test_plain_data_of_tensors_and_ranges() -> None:
    """Tensors, tuples and ranges become lists and numbers."""

    class Data:
        mean = torch.tensor([1.0, 2.0])
        size = torch.tensor(3)
        sizes = (1, 2)

    assert read_value(Data(), "mean") == [1.0, 2.0]
    assert read_value(Data(), "size") == 3
    assert read_value(Data(), "sizes") == [1, 2]
    assert read_value(Data(), "sizes.len") == 2
    assert read_value([0, 1, 2], "len") == 3


def test_worker_init_fn_is_named_in_a_file() -> None:
    """A loader's workers start with the named function; without workers it is an error."""
    loader = {
        "dataset": {"class_type": "values_team:Labelled", "size": 8},
        "num_workers": 1,
        "worker_init_fn": "values_team:start_worker",
    }
    built = load(data={"train": loader}).build()
    function = built.dataloader.worker_init_fn  # type: ignore[attr-defined]  # a DataLoader
    assert function.__name__ == "start_worker"
    with pytest.raises(ConfigError, match=r"data.train.worker_init_fn: requires worker processes"):
        load(data={"train": {**loader, "num_workers": 0}})
    with pytest.raises(ConfigError, match="outside the trusted packages"):
        ExperimentConfig.from_dict(document(data={"train": loader}))


# torch warns once when it traces a module that gets an output of another one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compile_and_checkpointing_from_a_file(tmp_path: Path) -> None:
    """Both are options of a file; a resumed run has them as well, with plain names of weights."""
    fields = {
        "compile": {"backend": "eager"},
        "gradient_checkpointing": ["layers.0"],
        "run_folder": str(tmp_path / "run"),
    }
    built = load(**fields).build()
    assert type(built.model).__name__ == "OptimizedModule"
    built.trainer()
    plain = load(run_folder=str(tmp_path / "plain")).build()
    plain.trainer()
    found = {n.removeprefix("_orig_mod."): v for n, v in built.model.state_dict().items()}
    expected = plain.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load(trainer={"max_epoch": 3}, **fields).build().trainer.resumed


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"compile": {"backend": "indctor"}}, "compile: .*indctor"),
        ({"compile": {"options": {"cpp.cxx": True}}}, "compile.options"),
        (
            {"compile": {"mode": "default", "options": {"max_autotune": True}}},
            "compile.options: can't be combined with mode",
        ),
        (
            {"compile": {"fullgraph": True}, "gradient_checkpointing": ["layers.0"]},
            "compile.fullgraph: can't be combined with gradient_checkpointing",
        ),
        ({"gradient_checkpointing": ["layer.0"]}, "gradient_checkpointing: 'layer.0' matches no"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: MLP has no gradient_check"),
    ],
)
def test_wrong_options_of_a_model_are_refused(fields: dict[str, Any], problem: str) -> None:
    """Options are checked before the first step, with their paths."""
    with pytest.raises(ConfigError, match=problem):
        load(**fields).build()


def test_compile_true_means_the_defaults() -> None:
    """``compile: true`` is the mapping of all defaults, and false compiles nothing."""
    assert load(compile=True).to_dict()["compile"]["backend"] == "inductor"
    assert load(compile=False).compile is None


def test_weights_to_begin_with_from_a_file(tmp_path: Path) -> None:
    """A rule alone is for all entries, and a frozen part and new groups get the loaded weights."""
    load(run_folder=str(tmp_path / "old")).build().trainer()
    groups = {"head": {"parameters": ["layers.2.*"], "lr": 0.5}}
    fields = {
        "model": {"class_type": "MLP", "inputs": 2, "hidden": [4], "outputs": 7},
        "run_folder": str(tmp_path / "new"),
        "init_from": {"path": str(tmp_path / "old"), "on_mismatch": "skip"},
        "optimizer": {"class_type": "torch.optim:SGD", "lr": 0.1, "groups": groups},
        "hooks": {"freeze": {"class_type": "FreezeHook", "patterns": ["layers.0.*"]}},
        "compile": {"backend": "eager"},
    }
    experiment = load(**fields)
    assert experiment.init_from is not None
    assert experiment.init_from.on_mismatch == {"*": "skip"}
    built = experiment.build()
    assert built.initial_weights is not None
    assert built.initial_weights.loaded == ("layers.0.weight", "layers.0.bias")
    built.trainer()
    saved = SavedWeights.from_checkpoint(tmp_path / "old/checkpoints/last").weights
    after = SavedWeights.from_checkpoint(tmp_path / "new/checkpoints/last").weights
    assert torch.equal(after["layers.0.weight"], saved["layers.0.weight"])
    assert after["layers.2.weight"].shape == (7, 4)
    longer = load(**fields, trainer={"max_epoch": 3}).build()
    assert longer.trainer.resumed
    assert longer.initial_weights is None
