"""Several optimizers in an experiment file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn

from robo_orchard_core.utils.config import ConfigError, ConfigFieldError, config_of
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.dry_run import dry_run, fast_run
from robo_orchard_lab.experiment.evaluation import evaluate
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.experiment.inspection import build_hook_set
from robo_orchard_lab.experiment.optimizers import make_optimizers
from robo_orchard_lab.experiment.overrides import from_arguments
from robo_orchard_lab.experiment.parts import OptimizerConfig
from robo_orchard_lab.experiment.resume_diff import Difference, differences
from robo_orchard_lab.experiment.samples import MLP
from robo_orchard_lab.experiment.schema import experiment_schema
from robo_orchard_lab.pipeline import SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.metrics import UnknownMetricError
from robo_orchard_lab.pipeline.plan import RunPlan

FILE = """\
model: {class_type: MLP, inputs: 2, hidden: [8], outputs: 3}
data: {train: {dataset: {class_type: Spirals, size: 8}, batch_size: 4}}
batch_processor: {class_type: SupervisedProcessor, loss: {class_type: torch.nn:CrossEntropyLoss}}
optimizer:
  first: {class_type: torch.optim:Adam, lr: 0.01, parameters: "layers.0.*"}
  last:
    class_type: torch.optim:SGD
    lr: 0.1
    parameters: [layers.2.weight, layers.2.bias]
    groups: {biases: {parameters: norms_and_biases, lr: 0.2}}
lr_scheduler:
  last: {class_type: torch.optim.lr_scheduler:StepLR, step_size: 3, every: epoch}
trainer: {max_epoch: 1}
"""
TWO_LOSSES = ("--batch_processor", f"{{class_type: '{__name__}:TwoLosses'}}")
ONE = "optimizer: {class_type: torch.optim:SGD, lr: 0.1, groups: {b: {parameters: ['*.bias']}}}\n"


class TwoLosses(SimpleBatchProcessor):
    """Batch processor with a loss for each of two layers."""

    def forward(self, model: nn.Module, batch: Any) -> Iterator[tuple[str, torch.Tensor]]:
        inputs, targets = batch
        for name in ("first", "last"):
            yield name, nn.functional.cross_entropy(model(inputs), targets)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, except for the file of this module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several.yaml").write_text(FILE)
    one = FILE.replace(FILE[FILE.index("optimizer:") : FILE.index("trainer:")], ONE)
    (tmp_path / "one.yaml").write_text(one)
    return tmp_path


def load(*options: str, file: str = "several.yaml") -> Any:
    """Load the experiment of a file with options of the command line."""
    return ExperimentConfig.load(file, overrides=from_arguments(options)[0], trust=__name__)


def variant(text: str, base: str = "several.yaml") -> Any:
    """Load the experiment of a file with a base."""
    Path("variant.yaml").write_text(f"base: {base}\n{text}")
    return load(file="variant.yaml")


def refused(*options: str) -> ConfigError:
    """Return the error of loading the file with options."""
    with pytest.raises(ConfigError) as caught:
        load(*options)
    return caught.value


def test_a_mapping_without_class_holds_optimizers_by_name() -> None:
    """Each optimizer has its class, options and groups, and each LR scheduler its own."""
    found = load()
    assert [*found.optimizer] == ["first", "last"]
    assert found.optimizer["first"].class_type is torch.optim.Adam
    assert found.optimizer["last"].groups["biases"].options() == {"lr": 0.2}
    assert found.lr_scheduler["last"].every == "epoch"
    assert isinstance(load(file="one.yaml").optimizer, OptimizerConfig)


@pytest.mark.parametrize("form", ["yaml", "toml", "json"])
def test_named_optimizers_round_trip(form: Literal["yaml", "toml", "json"]) -> None:
    """A document of the experiment in each format loads as the same experiment."""
    experiment = load()
    assert ExperimentConfig.from_str(experiment.to_str(form), form) == experiment


def test_named_optimizers_are_made_of_configs_in_code() -> None:
    """Code passes a mapping of configs, replaces a field by its path, and removes an optimizer."""
    configs = {
        "first": config_of(torch.optim.Adam, lr=0.01, parameters="layers.0.*"),
        "last": config_of(torch.optim.SGD, lr=0.1, parameters=["layers.2.*"]),
    }
    experiment = load().replace(optimizer=configs)
    changed = experiment.replace(**{"optimizer.first.lr": 0.5, "optimizer.last": configs["first"]})
    assert (changed.optimizer["first"].lr, changed.optimizer["last"].lr) == (0.5, 0.01)
    removed = experiment.replace(**{"optimizer.first": None})
    assert [*removed.optimizer] == ["last"]


def test_options_reach_into_named_optimizers() -> None:
    """The command line sets a field of one optimizer, and its origin says so."""
    experiment = load("--optimizer.first.lr", "1e-3", "--optimizer.last.groups.biases.lr=1")
    assert experiment.optimizer["first"].lr == 1e-3
    assert experiment.optimizer["last"].groups["biases"].options() == {"lr": 1.0}
    assert experiment.document is not None
    origins = experiment.document.origins
    assert str(origins["optimizer", "first", "lr"]) == "command line: --optimizer.first.lr"
    assert str(origins["optimizer", "last", "lr"]) == "several.yaml:8"


REFUSED: list[tuple[list[str], str, str, str]] = [
    (["--lr_scheduler.lat.class_type", "torch.optim.lr_scheduler:ConstantLR"],
     "command line: --lr_scheduler.lat.class_type", "lr_scheduler.lat",
     "there is no optimizer of this name; did you mean 'last'?"),
    (["--optimizer.last=null"], "several.yaml:12", "lr_scheduler.last", "there is first"),
    (["--optimizer.lst.lr", "1"], "command line: --optimizer.lst.lr", "optimizer.lst",
     "there is no entry of this name; did you mean 'last'?"),
    (["--optimizer.lr", "1"], "command line: --optimizer.lr", "optimizer.lr",
     "these are named: first, last; write fields inside of each"),
    (["--optimizer.first.lrr", "1"], "command line: --optimizer.first.lrr", "optimizer.first.lrr",
     "did you mean 'lr'?"),
    (["--optimizer.first.class_type", "torch.nn:ReLU"],
     "command line: --optimizer.first.class_type", "optimizer.first.class_type",
     "expected an optimizer, found a module"),
    (["--optimizer.first.params", "a"], "command line: --optimizer.first.params",
     "optimizer.first.params", "is given when it is built; write patterns"),
    (["--optimizer.last.parameters=null"], "several.yaml:6", "optimizer.last",
     "with several optimizers, each needs the patterns of its parameters"),
    (["--optimizer.lr", "{class_type: torch.optim:SGD, parameters: x}"],
     "command line: --optimizer.lr", "optimizer.lr", "choose another name"),
    (["--optimizer.groups", "{class_type: torch.optim:SGD, parameters: x}"],
     "command line: --optimizer.groups", "optimizer.groups", "found a field of "),
    (["--optimizer.a-b", "{class_type: torch.optim:SGD, parameters: x}"],
     "command line: --optimizer.a-b", "optimizer.a-b", "letters, digits and underscores"),
    (["--optimizer", "{first: null, last: null}"], "several.yaml:4", "optimizer",
     "found {}; write null"),
    (["--lr_scheduler.class_type", "torch.optim.lr_scheduler:ConstantLR"],
     "command line: --lr_scheduler.class_type", "lr_scheduler", "write first: {class_type: ...}"),
    (["--optimizer.class_type", "torch.optim:SGD"], "several.yaml:11", "lr_scheduler",
     "expected one LR scheduler, since its optimizer has no name"),
    (["--optimizer", "{class_type: torch.optim:SGD, g: {class_type: torch.optim:SGD}}"],
     "command line: --optimizer", "optimizer.g", "expected an optimizer or a mapping of names"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "source", "location", "problem"), REFUSED, ids=[" ".join(o) for o, *_ in REFUSED]
)
def test_what_does_not_fit_is_refused_with_its_place(
    options: list[str], source: str, location: str, problem: str
) -> None:
    """The error names the optimizer, what is wrong, and the option or the line of the file."""
    error = refused(*options)
    assert (error.source, error.location) == (source, location)
    assert problem in error.problem


def test_a_wrong_optimizer_hides_no_other_error() -> None:
    """Other fields are checked next to a refused optimizer; LR schedulers are not blamed."""
    options = ["--optimizer.last.class_type=torch.nn:ReLU", "--trainer.max_epoch", "0"]
    document = read_experiment("several.yaml", overrides=from_arguments(options)[0])
    with pytest.raises(ConfigError) as caught:
        ExperimentConfig.from_document(document, all_errors=True)
    assert caught.value.location == "optimizer.last.class_type"
    document = read_experiment(
        "several.yaml", overrides=from_arguments(["--optimizer.lst.lr=1", *options[1:]])[0]
    )
    with pytest.raises(ConfigError) as caught:
        ExperimentConfig.from_document(document, all_errors=True)
    found = [caught.value, *caught.value.others]
    assert [error.location for error in found] == ["optimizer.lst", "trainer.max_epoch"]


def test_variants_change_and_remove_named_optimizers() -> None:
    """A variant merges the fields of an optimizer by name; null removes it."""
    changed = variant("optimizer: {first: {lr: 0.5}, last: {groups: {biases: null}}}")
    assert changed.optimizer["first"].lr == 0.5
    assert changed.optimizer["last"].groups == {}
    removed = variant("optimizer: {last: null}\nlr_scheduler: {last: null}")
    assert [*removed.optimizer] == ["first"]
    assert removed.lr_scheduler == {}
    with pytest.raises(ConfigFieldError, match="none has this name; did you mean 'last'"):
        variant("optimizer: {lat: null}")


def test_the_other_form_replaces_the_base() -> None:
    """One optimizer replaces named ones, and named ones replace one; fields are not mixed."""
    one = variant("optimizer: {class_type: torch.optim:SGD, lr: 0.3}\nlr_scheduler: null")
    assert (one.optimizer.class_type, one.optimizer.lr) == (torch.optim.SGD, 0.3)
    named = variant(
        "optimizer:\n"
        "  a: {class_type: torch.optim:SGD, lr: 1, parameters: layers.0.*}\n"
        "  b: {class_type: torch.optim:SGD, lr: 1, parameters: layers.2.*}\n",
        "one.yaml",
    )
    assert [*named.optimizer] == ["a", "b"]


class Lookahead(torch.optim.SGD):
    """Optimizer with another one as an argument."""

    def __init__(self, params: Any, base: torch.optim.Optimizer | None = None) -> None:
        super().__init__(params, lr=0.1)


def test_an_optimizer_as_an_argument_is_no_named_one() -> None:
    """A variant of an optimizer that holds another one merges the inner one."""
    reference = f"{Lookahead.__module__}:Lookahead"
    inner = "base: {class_type: torch.optim:SGD, lr: 0.1, momentum: 0.5}"
    Path("one.yaml").write_text(
        Path("one.yaml")
        .read_text()
        .replace(ONE, f"optimizer: {{class_type: {reference}, {inner}}}\n")
    )
    Path("variant.yaml").write_text(
        "base: one.yaml\noptimizer: {base: {class_type: torch.optim:SGD, lr: 0.2}}"
    )
    merged = read_experiment("variant.yaml").document["optimizer"]
    base = {"class_type": "torch.optim.sgd:SGD", "lr": 0.2, "momentum": 0.5}
    assert merged == {"class_type": reference, "base": base}


class GAN(nn.Module):
    """Model with a frozen part, and a weight that two parts share."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.discriminator = nn.Linear(2, 2)
        self.features = nn.Linear(2, 2).requires_grad_(False)


def sgd(parameters: str | list[str], **options: Any) -> OptimizerConfig:
    made = config_of(torch.optim.SGD, lr=0.1, parameters=parameters, **options)
    assert isinstance(made, OptimizerConfig)
    return made


def test_each_optimizer_has_the_parameters_of_its_patterns() -> None:
    """Parameters are in the model's order; groups divide those of their optimizer only."""
    model = GAN()
    made = make_optimizers(
        {
            "g": sgd("generator.*", groups={"plain": {"parameters": "norms_and_biases", "lr": 1}}),
            "d": sgd(["discriminator.bias", "discriminator.weight"]),
        },
        model,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        name: [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        for name, optimizer in made.items()
    }
    assert groups == {
        "g": [
            ["generator.0.weight"],
            ["generator.0.bias", "generator.1.weight", "generator.1.bias"],
        ],
        "d": [["discriminator.weight", "discriminator.bias"]],
    }
    assert [group["lr"] for group in made["g"].param_groups] == [0.1, 1.0]


@pytest.mark.parametrize(
    ("g", "d", "location", "problem"),
    [
        ("generator", "discriminator.*", "g.parameters", "that is a module; did you mean 'gener"),
        ("generator.*", ["discriminator.*", "disc"], "d.parameters", "'disc' matches no parameter"),
        ("*", "discriminator.*", "d.parameters", "'discriminator.weight' belongs to the optimiz"),
        ("generator.0.*", "discriminator.*", "", "no optimizer has generator.1.weight"),
    ],
)  # fmt: skip
def test_parameters_of_no_or_two_optimizers_are_refused(
    g: str, d: str | list[str], location: str, problem: str
) -> None:
    """Each trainable parameter belongs to exactly one optimizer."""
    with pytest.raises(ConfigFieldError, match=re.escape(problem)) as error:
        make_optimizers({"g": sgd(g), "d": sgd(d)}, GAN())
    assert error.value.location == location


def test_a_group_of_a_foreign_parameter_is_refused() -> None:
    """A group can't match parameters of another optimizer."""
    foreign = {"foreign": {"parameters": ["discriminator.*"]}}
    with pytest.raises(ConfigFieldError, match="matches no parameter") as error:
        make_optimizers({"g": sgd("generator.*", groups=foreign)}, GAN())
    assert error.value.location == "g.groups.foreign.parameters"


def test_a_tied_parameter_belongs_to_one_optimizer() -> None:
    """A parameter with two names, in the patterns of two optimizers, is refused."""
    model = GAN()
    (first, *_) = model.generator.parameters()
    model.discriminator.weight = first
    with pytest.raises(ConfigFieldError, match="belongs to the optimizer 'g' already"):
        make_optimizers({"g": sgd("generator.*"), "d": sgd("discriminator.*")}, model)


def test_errors_of_patterns_have_the_line_of_the_file() -> None:
    """An error that needs the model names the line, too."""
    with pytest.raises(ConfigFieldError, match=r"'layers\.9' matches no parameter") as error:
        load("--optimizer.last.parameters", "layers.9").build()
    assert error.value.source == "command line: --optimizer.last.parameters"
    with pytest.raises(ConfigFieldError, match=r"no optimizer has layers\.0\.bias") as error:
        load("--optimizer.first.parameters", "layers.0.weight").build()
    assert (error.value.source, error.value.location) == ("several.yaml:4", "optimizer")
    with pytest.raises(ConfigFieldError, match="belongs to the optimizer 'first'") as error:
        load("--optimizer.first.parameters", "layers.*").build()
    assert (error.value.source, error.value.location) == (
        "several.yaml:9",
        "optimizer.last.parameters",
    )


@pytest.mark.parametrize("form", ["several", "one"])
def test_options_of_another_lr_scheduler_are_refused_with_their_line(form: str) -> None:
    """A metric for an LR scheduler that follows none is refused at the line of its LR scheduler."""
    path = "lr_scheduler.last" if form == "several" else "lr_scheduler"
    value = "{class_type: torch.optim.lr_scheduler:ConstantLR, monitor: loss/total}"
    with pytest.raises(PipelineConfigError, match="is for ReduceLROnPlateau, found C") as error:
        load(f"--{path}", value, file=f"{form}.yaml").build()
    assert str(error.value).startswith(f"--{path}: lr_scheduler_monitor=")


def test_a_metric_that_nobody_publishes_is_refused_with_its_line() -> None:
    """The error before the first step names the LR scheduler's field in the file."""
    plateau = "{class_type: torch.optim.lr_scheduler:ReduceLROnPlateau, monitor: eval/val/loss}"
    experiment = load(*TWO_LOSSES, "--lr_scheduler.last", plateau)
    with pytest.raises(UnknownMetricError, match="no hook is known to publish") as error:
        experiment.build(run_folder="run").trainer()
    place = "command line: --lr_scheduler.last: lr_scheduler.last.monitor"
    assert str(error.value).startswith(place)


def test_a_loss_for_an_unknown_optimizer_is_refused_with_the_line_of_the_optimizers() -> None:
    """The error of the first step has file and line, although code chose the name."""
    Path("several.yaml").write_text(FILE.replace("  last:", "  end:"))
    experiment = load(*TWO_LOSSES)
    with pytest.raises(BatchProcessorError, match="a loss for 'last', which is no opt") as error:
        experiment.build(run_folder="run").trainer()
    assert str(error.value).startswith("several.yaml:4: optimizer: TwoLosses.forward")


def test_built_objects_have_the_names() -> None:
    """Optimizers, LR schedulers and their options have the names of the file; auto is counted."""
    schedule = "{class_type: torch.optim.lr_scheduler:LinearLR, total_iters: auto, every: epoch}"
    run = load(*TWO_LOSSES, "--lr_scheduler.last", schedule, "--trainer.max_epoch", "3").build()
    assert [*run.optimizers] == ["first", "last"]
    assert run.optimizer is run.lr_scheduler is None
    assert [*run.lr_schedulers] == ["last"]
    assert run.lr_schedulers["last"].state_dict()["total_iters"] == 3
    run.trainer()
    assert run.trainer.progress.optimizer_steps == {"first": 6, "last": 6}
    assert run.lr_schedulers["last"].last_epoch == 3


def make_sgd(params: Any, speed: float) -> torch.optim.SGD:
    """Return an optimizer with an option of its own name."""
    return torch.optim.SGD(params, lr=speed)


def test_a_function_makes_an_optimizer_of_its_patterns() -> None:
    """A function that returns an optimizer, named or not, gets the parameters of its patterns."""
    made = f"{{func: '{__name__}:make_sgd', speed: 0.5, parameters: layers.2.*}}"
    named = load(*TWO_LOSSES, "--optimizer.last", made)
    one = load("--optimizer", made, "--lr_scheduler=null")
    for experiment, name in ((named, "last"), (one, "")):
        again = ExperimentConfig.from_dict(experiment.to_dict(), trust=__name__)
        (group,) = again.build().optimizers[name].param_groups
        assert (len(group["params"]), group["lr"]) == (2, 0.5)


def test_passed_optimizers_replace_those_of_the_file() -> None:
    """Objects of the caller have the names of the file's LR schedulers, or an error says so."""
    experiment = load(*TWO_LOSSES)
    model = MLP(2, [8], 3)
    first, _, last = model.layers
    optimizers = {
        "first": torch.optim.SGD(first.parameters(), lr=1),
        "last": torch.optim.SGD(last.parameters(), lr=2),
    }
    run = experiment.build(model=model, optimizer=optimizers)
    assert run.lr_schedulers["last"].base_lrs == [2]
    with pytest.raises(ConfigFieldError, match="optimizer= lacks 'last'"):
        experiment.build(model=model, optimizer=optimizers["first"])


def test_trials_of_named_optimizers() -> None:
    """A dry run measures the states of all optimizers; the plan has the hook that steps them."""
    experiment = load(*TWO_LOSSES)
    averages, steps = 2 * 24, 2  # of Adam, for 24 numbers in two parameters; SGD has no state
    assert dry_run(experiment).memory.optimizer == 4 * (averages + steps)
    assert "saved, and resumed from step 2 to 3" in fast_run(experiment)
    planned = RunPlan.of(build_hook_set(experiment)).hooks
    assert ("on_step", "NamedOptimizersHook") in [(each.channel, each.hook) for each in planned]


def changes(*options: str) -> list[Difference]:
    before, after = load().to_dict(), load(*options).to_dict()
    return differences(before, after)


@pytest.mark.parametrize(
    ("option", "effect"),
    [
        ("--lr_scheduler.last.every=optimizer_step", "trajectory"),
        ("--lr_scheduler.last.step_size=4", "trajectory"),
        ("--optimizer.first.lr=0.02", "trajectory"),
        ("--optimizer.last.groups.biases.lr=0.02", "trajectory"),
        ("--optimizer.first.weight_decay=0.02", "impossible"),
        ("--optimizer.first.parameters=layers.[0]*", "impossible"),
        ("--lr_scheduler=null", "trajectory"),
    ],
)
def test_changes_of_named_optimizers_have_the_effect_of_one(option: str, effect: str) -> None:
    """A change of a named optimizer has the effect on a resumed run of the same change of one."""
    (found,) = changes(option)
    assert found.field == option.removeprefix("--").partition("=")[0]
    assert found.resume == effect


def test_a_run_resumes_with_another_learning_rate_of_one_optimizer() -> None:
    """The other optimizers keep the learning rates of their groups."""
    load(*TWO_LOSSES).build(run_folder="run").trainer()
    options = ("--optimizer.first.lr=0.5", "--trainer.max_epoch=2")
    resumed = load(*TWO_LOSSES, *options).build(run_folder="run")
    assert resumed.trainer.progress.epoch_id == 1
    rates = {n: [g["lr"] for g in each.param_groups] for n, each in resumed.optimizers.items()}
    assert rates == {"first": [0.5], "last": [0.1, 0.2]}


def test_averages_of_one_optimizer_are_evaluated() -> None:
    """Saved weights of an EMA that names an optimizer are evaluated without a trainer."""
    options = (*TWO_LOSSES, "--hooks.ema={class_type: EMA, decay: 0.5, optimizer: first}")
    evaluated = "--data.evaluation.val={dataset: {class_type: Spirals, size: 8}, batch_size: 4}"
    experiment = load(*options, evaluated)
    experiment.build(run_folder="run").trainer()
    saved = SavedWeights.find("run")
    found = evaluate(experiment, saved, weights=["ema", "model"])
    assert found["eval/val/ema/loss/last"] != found["eval/val/model/loss/last"]


def test_a_changed_limit_matters_to_a_named_auto_lr_scheduler() -> None:
    """The effect of a limit considers each LR scheduler."""
    schedule = "torch.optim.lr_scheduler:OneCycleLR, max_lr: 0.1, total_steps"
    documents = [
        load("--lr_scheduler.last", f"{{class_type: {schedule}: {steps}}}", *limit).to_dict()
        for steps in ("auto", "7")
        for limit in ([], ["--trainer.max_epoch=3"])
    ]
    (auto,) = differences(*documents[:2])
    assert auto.resume == "trajectory"
    (number,) = differences(*documents[2:])
    assert "lr_scheduler still ends after 7 steps" in number.why


def test_the_schema_accepts_both_forms() -> None:
    """An editor completes the fields of one optimizer and of named ones, and marks mistakes."""
    needed = ("MLP", "Spirals", "Processor", "CrossEntropyLoss", ":SGD", ":Adam", ":StepLR")
    names = {name: place for name, place in CATALOGUE.items() if place.endswith(needed)}
    validator = Draft202012Validator(experiment_schema(names))

    def errors(document: dict[str, Any]) -> list[str]:
        return [
            ".".join(map(str, error.absolute_path)) for error in validator.iter_errors(document)
        ]

    assert errors(load().to_dict()) == errors(load(file="one.yaml").to_dict()) == []
    for path, value in (("lr", "fast"), ("lrr", 1), ("groups", {"b": {"lr": 1}})):
        document = load().to_dict()
        document["optimizer"]["last"][path] = value
        assert errors(document), path
    document = load().to_dict()
    document["optimizer"]["last"] = 3
    assert errors(document)
    for optimizer in (
        {"first": {"lr": 0.1}, "last": None},
        {"lr": 0.1},
        {"groups": {"b": {"lr": 1}}},
        {"a": {"class_type": "torch.optim:SGD", "parameters": "x.*"}},
    ):
        assert errors({"base": "several.yaml", "optimizer": optimizer}) == []
    assert errors({"base": "several.yaml", "optimizer": {"first": {"lr": "fast"}}}) == []
