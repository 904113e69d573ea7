"""Experiment configs are validated, compared, changed and serialized."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from robo_orchard_core.utils.config import ConfigError, ConfigFieldError, Format, TrustError
from robo_orchard_lab.experiment import (
    DataConfig,
    ExperimentConfig,
    LoaderConfig,
    TrainerConfig,
    config_of,
)
from robo_orchard_lab.experiment.overrides import from_arguments
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import SupervisedProcessor
from robo_orchard_lab.pipeline.hooks import EMAConfig, StatsMonitorConfig

FORMATS: tuple[Format, ...] = ("yaml", "toml", "json")
SAMPLES = "robo_orchard_lab.experiment.samples"
PROCESSORS = "robo_orchard_lab.pipeline.batch_processor"


def document(**changes: Any) -> dict[str, Any]:
    """Return the document of a runnable experiment."""
    return {
        "name": "spirals",
        "model": {"class_type": f"{SAMPLES}:MLP", "inputs": 2, "hidden": [8], "outputs": 3},
        "data": {"train": {"dataset": {"class_type": f"{SAMPLES}:Spirals", "size": 32}}},
        "batch_processor": {
            "class_type": f"{PROCESSORS}:SupervisedProcessor",
            "loss": {"class_type": "torch.nn.modules.loss:CrossEntropyLoss"},
        },
        "optimizer": {"class_type": "torch.optim.sgd:SGD", "lr": 0.1},
        "hooks": {"stats": {"class_type": "StatsMonitor", "grad_norm": False}},
        "trainer": {"max_epoch": 2},
        **changes,
    }


def described(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict(document(**changes))


def in_code(**changes: Any) -> ExperimentConfig:
    """Return the experiment of `document`, built in code."""
    return ExperimentConfig(
        **{
            "name": "spirals",
            "model": config_of(MLP, inputs=2, hidden=[8], outputs=3),
            "data": DataConfig(train=LoaderConfig(dataset=config_of(Spirals, size=32))),
            "batch_processor": config_of(
                SupervisedProcessor, loss=config_of(torch.nn.CrossEntropyLoss)
            ),
            "optimizer": config_of(torch.optim.SGD, lr=0.1),
            "hooks": {"stats": StatsMonitorConfig(grad_norm=False)},
            "trainer": TrainerConfig(max_epoch=2),
            **changes,
        }
    )


def written(folder: Path, name: str = "spirals.yaml", **changes: Any) -> Path:
    described().save(folder / name)
    return folder / name


def test_code_and_files_describe_equal_experiments() -> None:
    """A config from code equals the config from a document, and differs after a change."""
    assert in_code() == described()
    assert in_code(seed=1) != described()
    assert in_code(hooks={"stats": StatsMonitorConfig(), "ema": EMAConfig()}) != described()


def test_null_parts_load_as_none(tmp_path: Path) -> None:
    """Null parts of a file load as None."""
    file = written(tmp_path)
    loaded = ExperimentConfig.load(file, overrides={"model": None, "batch_processor": None})
    assert (loaded.model, loaded.batch_processor) == (None, None)


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_experiment_round_trips_through_every_format(suffix: str, tmp_path: Path) -> None:
    """A saved experiment loads as an equal value."""
    path = tmp_path / f"spirals.{suffix}"
    in_code().save(path)
    assert ExperimentConfig.load(path) == in_code()


def test_replace_reaches_into_parts() -> None:
    """Dotted names change a copy, and the original stays unchanged."""
    first = in_code()
    second = first.replace(**{"optimizer.lr": 0.5, "trainer.max_epoch": 7})
    assert second == in_code(
        optimizer=config_of(torch.optim.SGD, lr=0.5), trainer=TrainerConfig(max_epoch=7)
    )
    assert first == in_code()


def test_replace_reaches_named_hooks_and_removes_them() -> None:
    """Changes reach named hooks and fields with defaults, as overrides of a file do."""
    first = in_code()
    changes = {"hooks.stats.grad_norm": True, "hooks.ema": EMAConfig(), "optimizer.momentum": 0.9}
    second = first.replace(**changes)
    assert second == in_code(
        hooks={"stats": StatsMonitorConfig(grad_norm=True), "ema": EMAConfig()},
        optimizer=config_of(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    assert second.replace(**{"hooks.ema": None, "hooks.stats": None}) == second.replace(hooks={})
    with pytest.raises(ConfigFieldError, match=r"hooks\.stat: .*did you mean 'stats'"):
        first.replace(**{"hooks.stat.grad_norm": True})
    with pytest.raises(
        ConfigFieldError, match=r"optimizer\.class_type: .*replace the entire config"
    ):
        first.replace(**{"optimizer.class_type": torch.optim.Adam})


def test_experiment_can_be_pickled() -> None:
    """An experiment can be pickled for spawned processes."""
    assert pickle.loads(pickle.dumps(described())) == described()


@pytest.mark.parametrize("format_", FORMATS)
def test_data_types_and_devices_are_texts_in_files(format_: Format) -> None:
    """Dtypes and devices are texts, also for untyped parameters of torch's layers."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
    mine = in_code(model=config_of(torch.nn.Linear, in_features=2, out_features=3, **options))
    text = mine.to_str(format_)
    assert "float64" in text
    assert "torch.float64" not in text
    again = ExperimentConfig.from_str(text, format_)
    assert again == mine
    assert again.model is not None
    assert again.model().weight.dtype == torch.float64
    with pytest.raises(ConfigFieldError, match=r"model\.dtype: .*such as 'float32'"):
        mine.replace(**{"model.dtype": "flaot64"})


def test_repr_shows_the_set_fields() -> None:
    """The repr shows classes and given arguments only."""
    text = repr(in_code())
    assert "SGDConfig(class_type=<class 'torch.optim.sgd.SGD'>, lr=0.1)" in text
    assert "amsgrad" not in repr(in_code(optimizer=config_of(torch.optim.Adam)))


def test_override_of_a_text_field_is_text(tmp_path: Path) -> None:
    """``--name 3`` gives the text "3", while ``--trainer.max_epoch 3`` gives a number."""
    overrides, _ = from_arguments(["--name", "3", "--trainer.max_epoch", "3"])
    loaded = ExperimentConfig.load(written(tmp_path), overrides=overrides)
    assert (loaded.name, loaded.trainer.max_epoch) == ("3", 3)


def test_wrong_override_of_a_part_is_reported(tmp_path: Path) -> None:
    """An invalid override of a part is reported with its field."""
    typed = "{class_type: 'torch.optim:Adam', learning_rate: 3}"
    overrides, _ = from_arguments(["--name", "3", "--optimizer", typed])
    with pytest.raises(ConfigFieldError, match="AdamConfig has no such field") as found:
        ExperimentConfig.load(written(tmp_path), overrides=overrides)
    assert found.value.path == ("optimizer", "learning_rate")


def test_overrides_reach_fields_of_the_configured_class(tmp_path: Path) -> None:
    """Overrides reach the fields of a class set by other overrides, in any order."""
    file = written(tmp_path)
    changed = ExperimentConfig.load(
        file, overrides={"hooks.stats.grad_norm": True, "optimizer.momentum": 0.9}
    )
    assert changed.hooks["stats"].grad_norm is True
    assert changed.optimizer == config_of(torch.optim.SGD, lr=0.1, momentum=0.9)
    for order in (1, -1):
        other = {"optimizer.betas": [0.8, 0.9], "optimizer.class_type": "torch.optim.adam:Adam"}
        overrides = dict([*other.items()][::order])
        adam = ExperimentConfig.load(file, overrides=overrides).optimizer
        assert adam == config_of(torch.optim.Adam, betas=(0.8, 0.9))


def test_null_removes_a_hook(tmp_path: Path) -> None:
    """`hooks.stats=null` on the command line removes the hook."""
    loaded = ExperimentConfig.load(
        written(tmp_path), overrides=from_arguments(["--hooks.stats=null"])[0]
    )
    assert loaded.hooks == {}


@pytest.mark.parametrize(
    ("changes", "place", "says"),
    [
        ({"trainer": {}}, "trainer", "set one of max_epoch, max_step, max_optimizer_step"),
        ({"models": {}}, "models", "did you mean 'model'?"),
        ({"hooks": {"checkpoint": {"class_type": "StatsMonitor"}}}, "hooks.checkpoint", "name"),
        (
            {"optimizer": None, "lr_scheduler": {"class_type": "x:Y"}},
            "lr_scheduler.class_type",
            "trusted",
        ),
        (
            {
                "optimizer": None,
                "lr_scheduler": {"class_type": "torch.optim.lr_scheduler:ConstantLR"},
            },
            "lr_scheduler",
            "requires an optimizer",
        ),
        ({"checkpoint": {"everys": "1 epoch"}}, "checkpoint.everys", "did you mean 'every'?"),
        ({"hooks": {"s": {"class_type": "torch.nn.modules.linear:Linear"}}}, "hooks.s.class_type",
         "PipelineHooks"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"accelerator": {"mixed_precision": "fp8"}}, "accelerator.mixed_precision", "'bf16'"),
    ],
)  # fmt: skip
def test_errors_name_the_field(changes: dict[str, Any], place: str, says: str) -> None:
    """Each error has the path of the field and the expected value."""
    with pytest.raises(ConfigError) as found:
        described(**changes)
    assert found.value.location == place
    assert says in str(found.value)


@pytest.mark.parametrize(
    ("loader", "place"),
    [
        ({"shuffle": True, "sampler": {"class_type": "torch.utils.data.sampler:RandomSampler"}},
         "sampler"),
        ({"prefetch_factor": 2}, "prefetch_factor"),
        ({"persistent_workers": True}, "persistent_workers"),
        ({"batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_exclusive_loader_fields_are_refused(loader: dict[str, Any], place: str) -> None:
    """Exclusive loader fields are refused before any data is opened."""
    dataset = {"class_type": f"{SAMPLES}:Spirals"}
    with pytest.raises(ConfigFieldError) as found:
        described(data={"train": {"dataset": dataset, **loader}})
    assert found.value.location == f"data.train.{place}"


@pytest.mark.parametrize(
    ("group", "place", "says"),
    [
        ({"parameters": ["fc.*"], "weight_dekay": 0}, "weight_dekay", "'weight_decay'"),
        ({"parameters": ["fc.*"], "lr": "fast"}, "lr", "valid number"),
        ({"lr": 0.1}, "parameters", "required"),
        ({"parameters": "norms"}, "parameters", "norms_and_biases"),
        ({"parameters": "fc.*"}, "parameters", "found 'fc.*'; write ['fc.*']"),
    ],
)
def test_parameter_groups_accept_options_of_the_optimizer(
    group: dict[str, Any], place: str, says: str
) -> None:
    """Group options are the optimizer's, with its types."""
    with pytest.raises(ConfigFieldError) as found:
        described(optimizer={"class_type": "torch.optim.sgd:SGD", "groups": {"head": group}})
    assert found.value.location == f"optimizer.groups.head.{place}"
    assert says in str(found.value)


def test_integers_of_an_lr_scheduler_may_be_auto() -> None:
    """Integers of nested LR schedulers may be auto too."""
    lr = "torch.optim.lr_scheduler"
    scheduler_config = described(
        lr_scheduler={
            "class_type": f"{lr}:SequentialLR",
            "schedulers": [
                {"class_type": f"{lr}:LinearLR", "total_iters": 5},
                {"class_type": f"{lr}:CosineAnnealingLR", "T_max": "auto"},
            ],
            "milestones": [5],
        }
    ).lr_scheduler
    assert scheduler_config is not None
    assert scheduler_config.schedulers[1].T_max == "auto"
    with pytest.raises(ConfigFieldError):
        described(lr_scheduler={"class_type": f"{lr}:ExponentialLR", "gamma": "auto"})


def test_configs_in_code_follow_the_rules_of_files() -> None:
    """Invalid configs in code raise pydantic's error."""
    with pytest.raises(ValidationError, match="the run has no limit"):
        in_code(trainer=TrainerConfig())
    with pytest.raises(ValidationError, match="expected a Optimizer"):
        in_code(optimizer=config_of(torch.nn.Linear, in_features=1, out_features=1))


def test_the_run_folder_follows_from_the_name() -> None:
    """The default run folder is runs/NAME."""
    assert in_code().folder() == Path("runs/spirals")
    assert in_code(run_folder="elsewhere").folder() == Path("elsewhere")


def test_only_the_catalogue_is_trusted_by_default(tmp_path: Path) -> None:
    """Other code of this project, or of users, must be trusted by name."""
    other = {"class_type": f"{__name__}:Net"}
    for reference in ("robo_orchard_lab.pipeline.run.durable:remove_tree", f"{__name__}:Net"):
        with pytest.raises(TrustError):
            described(model={"func" if "durable" in reference else "class_type": reference})
    trusted: Any = ExperimentConfig.from_dict(document(model=other), trust=__name__)
    assert isinstance(trusted.model(), Net)


class Net(torch.nn.Module):
    """A user's model."""
