"""Tests of search spaces."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_lab.search.space import Dimension, SweepSpace, make_pruner

LR = Dimension(low=1e-4, high=0.1, log=True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "either low and high, or choices"),
        ({"low": 1, "high": 2, "choices": [1]}, "either low and high, or choices"),
        ({"low": 1}, "both low and high"),
        ({"low": 2, "high": 1}, "low <= high"),
        ({"low": 0, "high": 1, "log": True}, "low > 0"),
        ({"low": 1, "high": 2.5, "type": "int"}, "integers"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "either log or step"),
        ({"choices": []}, "at least one choice"),
        ({"choices": [1, 1]}, "one twice"),
        ({"choices": [1], "log": True}, "not choices"),
    ],
)
def test_an_impossible_dimension_is_an_error(fields: dict[str, object], match: str) -> None:
    """The error says what a dimension requires."""
    with pytest.raises(ValueError, match=match):
        Dimension(**fields)  # type: ignore[arg-type]


def test_a_dimension_suggests_values_of_its_type() -> None:
    """Integers, floats, scalars, lists and named parts are suggested as they are in a file."""
    sgd = {"class_type": "torch.optim:SGD"}
    dimensions = {
        "lr": LR,
        "size": Dimension(low=2, high=8, step=2),
        "rate": Dimension(low=0, high=1, type="float"),
        "hidden": Dimension(choices=[[8], [16, 16]]),
        "optimizer": Dimension(choices={"sgd": sgd}),
        "scale": Dimension(choices=[None, True, 0.5]),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, list[object]] = {name: [] for name in dimensions}
    for _ in range(40):
        trial = study.ask()
        for name, dimension in dimensions.items():
            seen[name].append(dimension.suggest(trial, name))
        study.tell(trial, 0.0)
    assert all(isinstance(lr, float) and 1e-4 <= lr <= 0.1 for lr in seen["lr"])
    assert {*map(str, seen["size"])} == {"2", "4", "6", "8"}
    assert all(isinstance(rate, float) for rate in seen["rate"])
    assert all(hidden in ([8], [16, 16]) for hidden in seen["hidden"])
    assert seen["optimizer"] == [sgd] * 40
    assert all(scale in (None, True, 0.5) for scale in seen["scale"])


def test_a_file_gives_the_location_of_an_error(tmp_path: Path) -> None:
    """An invalid space names the file and the field; a missing file is an error, too."""
    file = tmp_path / "space.yaml"
    file.write_text("metric: eval/loss\nparameters:\n  optimizer.lr: {low: 1, hihg: 2}\n")
    with pytest.raises(ConfigError, match=r"space\.yaml.*hihg.*did you mean 'high'"):
        SweepSpace.read(file)
    with pytest.raises(ConfigError, match="can't be read"):
        SweepSpace.read(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("name", "match"), [("run_folder", "can't be searched"), ('"run_folder"', "can't be searched")]
)
def test_fields_that_a_sweep_sets_cannot_be_searched(name: str, match: str) -> None:
    """The run folder belongs to the sweep."""
    with pytest.raises(ValueError, match=match):
        SweepSpace(metric="eval/loss", parameters={name: Dimension(choices=["a"])})


def test_samplers_and_pruners_are_those_of_optuna() -> None:
    """Classes are named as in experiment files; other code and wrong arguments are errors."""
    space = SweepSpace(metric="eval/loss", parameters={"optimizer.lr": LR})
    assert isinstance(space.make_sampler(), optuna.samplers.TPESampler)
    full = {"class_type": "optuna.pruners:MedianPruner", "n_startup_trials": 2}
    assert isinstance(make_pruner(full), optuna.pruners.MedianPruner)
    assert isinstance(make_pruner(None), optuna.pruners.NopPruner)
    with pytest.raises(ConfigError, match=r"pruner\.class_type: .*did you mean 'MedianPruner'"):
        make_pruner({"class_type": "MedianPrunner"})
    with pytest.raises(ConfigError, match="expected a class of optuna"):
        make_pruner({"class_type": "os:system"})
    with pytest.raises(ConfigError, match="expected a class of optuna"):
        make_pruner({"class_type": "BasePruner"})
    with pytest.raises(ConfigError, match="MedianPruner refuses its arguments"):
        make_pruner({"class_type": "MedianPruner", "startup": 2})


def test_a_sampler_does_not_repeat_itself_after_a_restart() -> None:
    """Samplers with one seed suggest other values for other trials, equal ones for the same."""
    space = SweepSpace(
        metric="eval/loss",
        parameters={"optimizer.lr": LR},
        sampler={"class_type": "RandomSampler", "seed": 1},
    )

    def suggested(number: int) -> object:
        study = optuna.create_study(sampler=space.make_sampler(number))
        return LR.suggest(study.ask(), "optimizer.lr")

    assert suggested(3) == suggested(3) != suggested(4)


def test_a_grid_requires_choices() -> None:
    """GridSampler gets the choices; an interval has none."""
    grid = {"class_type": "GridSampler"}
    choices = {"a": Dimension(choices=[1, 2]), "b": Dimension(choices=["x", "y"])}
    space = SweepSpace(metric="eval/loss", parameters=choices, sampler=grid)
    assert isinstance(space.make_sampler(), optuna.samplers.GridSampler)
    space = SweepSpace(metric="eval/loss", parameters={"a": LR}, sampler=grid)
    with pytest.raises(ConfigError, match=r"parameters\.a: GridSampler requires choices"):
        space.make_sampler()
