"""Experiment files that train on a dataset of others, without a line of Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline.sinks.jsonl import read_metrics
from robot_data import camera, write_dataset
from tiny import weights

# Another robot: six joints, nine numbers of state, two cameras of different sizes.
FEATURES: dict[str, dict[str, Any]] = {
    "action": {"dtype": "float32", "shape": (6,), "names": [f"joint_{n}" for n in range(6)]},
    "observation.state": {"dtype": "float64", "shape": (9,)},
    "observation.images.front": camera(48, 64),
    "observation.images.gripper": camera(32, 32),
    "observation.effort": {"dtype": "float32", "shape": (6,)},
    "next.done": {"dtype": "bool", "shape": (1,)},
}
FILE = """
seed: 1
model:
  class_type: BehaviorCloning
  statistics: {from_data: statistics}
  hidden: [32]
  chunk_size: 10
data:
  train:
    dataset:
      class_type: LeRobotDataset
      folder: data
      episodes: train
      validation_fraction: 0.25
      chunk_size: 10
      columns: [observation.state, action]
    batch_size: 8
    shuffle: true
  evaluation:
    val:
      dataset:
        class_type: LeRobotDataset
        folder: data
        episodes: validation
        validation_fraction: 0.25
        chunk_size: 10
        columns: [observation.state, action]
      batch_size: 8
batch_processor: {class_type: PolicyProcessor}
optimizer: {class_type: "torch.optim:AdamW", lr: 0.01}
hooks:
  validation: {class_type: ValidationHook, every: 1 epoch}
  log:
    class_type: MetricsLogger
    every: 5 steps
    sinks: [{class_type: JsonLinesSink, path: metrics.jsonl}]
  losses: {class_type: LossTracker}
trainer: {max_step: 40}
"""
ACT = {
    "class_type": "ACT",
    "statistics": {"from_data": "statistics"},
    "chunk_size": 10,
    **{"dim": 16, "heads": 2, "feedforward_dim": 16, "encoder_layers": 1, "latent_dim": 4},
}


@pytest.fixture(params=[30, 50])
def fps(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write the dataset and the file to the working directory, and return the frame rate."""
    rate: int = request.param
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data"), (14, 11, 1, 16), FEATURES, fps=rate)
    Path("experiment.yaml").write_text(FILE)
    return rate


def train(folder: str, **changes: Any) -> torch.nn.Module:
    document = yaml.safe_load(Path("experiment.yaml").read_text())
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = document
        for key in outer:
            target = target[key]
        target[last] = value
    Path("changed.yaml").write_text(json.dumps(document))
    built = ExperimentConfig.load("changed.yaml").build(run_folder=folder)
    built.trainer()
    return built.model


def test_a_policy_trains_on_the_states(fps: int) -> None:
    """Behavior cloning learns the chunks; the loss of both splits is in the run's metrics."""
    model = train("run")
    values = [each for record in read_metrics("run/metrics.jsonl") for each in record.values]
    losses = [each.value for each in values if each.name == "loss/total"]
    assert losses[-1] < 0.8 * losses[0], losses
    assert "eval/val/loss" in {each.name for each in values}
    actions = model.predict_actions({"observation.state": torch.zeros(2, 9)})  # type: ignore[operator]  # a policy
    assert actions.shape == (2, 10, 6)


@pytest.mark.parametrize("fps", [50], indirect=True)
def test_workers_make_no_difference(fps: int) -> None:
    """The same weights are trained with and without workers, videos included."""
    changes = {
        "model": ACT,
        "data__train__dataset__columns": None,
        "data__evaluation": {},
        "hooks": {},
        "trainer": {"max_step": 2},
    }
    by_workers = [
        weights(train(f"run{workers}", data__train__num_workers=workers, **changes))
        for workers in (0, 2)
    ]
    assert all(map(torch.equal, *by_workers))


@pytest.mark.parametrize("fps", [30], indirect=True)
def test_a_wrong_folder_is_an_error_at_its_place(fps: int) -> None:
    """A missing dataset is an error with the path in the file and the folder."""
    with pytest.raises(ConfigError, match=r"data\.train\.dataset.*found no folder 'other'"):
        train("run", data__train__dataset__folder="other")
