"""Evaluating the saved weights of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.experiment import (
    DataConfig,
    ExperimentConfig,
    LoaderConfig,
    TrainerConfig,
    config_of,
)
from robo_orchard_lab.experiment.evaluation import best_weights, evaluate
from robo_orchard_lab.experiment.existing_run import record
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
from robo_orchard_lab.experiment.run_folder import NoRunError
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import SupervisedProcessor
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hooks import EMAConfig, KeepBestConfig, ValidationHookConfig


def spirals(size: int, seed: int) -> LoaderConfig:
    return LoaderConfig(dataset=config_of(Spirals, size=size, seed=seed), batch_size=8)


ACCURACY = {"accuracy": config_of(MulticlassAccuracy, num_classes=3)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A run with averaged weights, used in one of two evaluations."""
    experiment = ExperimentConfig(
        run_folder=str(tmp_path_factory.mktemp("runs") / "first"),
        model=config_of(MLP, inputs=2, hidden=[8], outputs=3),
        data=DataConfig(
            train=spirals(48, 0), evaluation={"val": spirals(20, 1), "test": spirals(12, 2)}
        ),
        batch_processor=config_of(SupervisedProcessor, loss=config_of(torch.nn.CrossEntropyLoss)),
        optimizer=config_of(torch.optim.SGD, lr=0.5),
        hooks={
            "average": EMAConfig(decay=0.5),
            "own": ValidationHookConfig(every="2 steps", metrics=ACCURACY, sets=["val"]),
            "averaged": ValidationHookConfig(every="2 steps", weights="average", sets=["test"]),
            "best": KeepBestConfig(
                monitor="eval/val/loss", mode="max", path=Path("best.safetensors")
            ),
        },
        checkpoint={"every": "2 steps", "keep_last": None},
        trainer=TrainerConfig(max_step=8),
    )
    built = experiment.build()
    record(experiment, processes=1)
    built.trainer()
    return experiment


def test_evaluation_repeats_the_metrics_of_the_run(trained: ExperimentConfig) -> None:
    """Loss and metrics of each checkpoint equal the run's, including averaged weights."""
    place = find_checkpoints(trained.folder())
    for info in CheckpointStore(place.root).list():
        found = evaluate(trained, SavedWeights.from_checkpoint(info.path))
        assert found == dict(info.metrics)
        assert {*found} == {"eval/val/loss", "eval/val/accuracy", "eval/test/loss"}


def test_selected_sets_are_evaluated_alone(trained: ExperimentConfig) -> None:
    """Named sets are evaluated with the metrics of their hook; an unknown name is refused."""
    saved = SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick())
    assert {*evaluate(trained, saved, ["test"])} == {"eval/test/loss"}
    with pytest.raises(ConfigFieldError, match="there is no data set 'tset'; did you mean 'test'"):
        evaluate(trained, saved, ["tset"])


class Shaken(Spirals):
    """Points with noise at construction and at each loading."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.points += torch.rand(2)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        point, arm = super().__getitem__(index)
        return point + torch.rand(2), arm


def test_evaluation_is_deterministic(trained: ExperimentConfig) -> None:
    """Evaluation is repeatable with random data, and for a run that evaluates at its start."""
    saved = SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick())
    shaken = LoaderConfig(dataset=config_of(Shaken, size=12), batch_size=8)
    changes: dict[str, Any] = {"hooks.own.at_start": True, "data.evaluation.val": shaken}
    again = trained.replace(**changes)
    first = evaluate(again, saved)
    assert evaluate(again, saved) == first
    assert {*first} == {"eval/val/loss", "eval/val/accuracy", "eval/test/loss"}


def test_loss_is_evaluated_without_hooks(trained: ExperimentConfig) -> None:
    """Without hooks, the mean loss of the model's own weights is evaluated."""
    saved = SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick())
    found = evaluate(trained.replace(hooks={}), saved)
    assert {*found} == {"eval/val/loss", "eval/test/loss"}
    assert found["eval/val/loss"] == evaluate(trained, saved)["eval/val/loss"]
    assert found["eval/test/loss"] != evaluate(trained, saved)["eval/test/loss"]
    bare = trained.replace(hooks={}, data=DataConfig(train=spirals(8, 0)))
    with pytest.raises(ConfigFieldError, match="there are no evaluation sets"):
        evaluate(bare, saved)


def test_best_weights_are_the_kept_weights(trained: ExperimentConfig) -> None:
    """The best weights are KeepBest's file, or the best checkpoint by the retention rule."""
    place = find_checkpoints(trained.folder())
    kept = best_weights(trained, trained.folder(), place)
    assert kept.path == trained.folder() / "best.safetensors"
    values = [info.metrics["eval/val/loss"] for info in CheckpointStore(place.root).list()]
    assert evaluate(trained, kept)["eval/val/loss"] == max(values)
    without = trained.replace(hooks={})
    with pytest.raises(NoRunError, match="the best weights of"):
        best_weights(without, trained.folder(), place)
    monitored = place.__class__(
        place.root, policy={"keep_best": 1, "monitor": "eval/val/loss", "mode": "min"}
    )
    best = best_weights(without, trained.folder(), monitored)
    assert evaluate(trained, best)["eval/val/loss"] == min(values)


def test_evaluation_writes_no_files(trained: ExperimentConfig) -> None:
    """Evaluation leaves the run folder unchanged."""

    def look() -> dict[str, Any]:
        files = [path for path in trained.folder().rglob("*") if path.is_file()]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = look()
    evaluate(trained, SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick()))
    assert look() == before


def test_weights_of_another_model_are_refused(trained: ExperimentConfig, tmp_path: Path) -> None:
    """The error lists differing names and shapes; other checkpoints are refused."""
    saved = SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick())
    other = trained.replace(model=config_of(MLP, inputs=2, hidden=[9], outputs=3))
    with pytest.raises(StateError, match=r"another model: .*saved as float32\[8, 2\]"):
        evaluate(other, saved)
    with CheckpointStore(tmp_path) as store:
        info = store.save(1, {"model": {}})
    with pytest.raises(CheckpointError, match="not a checkpoint of a trainer"):
        SavedWeights.from_checkpoint(info.path)


def test_the_saved_config_evaluates_equally(trained: ExperimentConfig) -> None:
    """The config in the run folder evaluates as the config in code."""
    own = ExperimentConfig.load(trained.folder() / "config.yaml").replace(
        run_folder=str(trained.folder())
    )
    saved = SavedWeights.from_checkpoint(find_checkpoints(trained.folder()).pick())
    assert json.dumps(evaluate(own, saved)) == json.dumps(evaluate(trained, saved))
