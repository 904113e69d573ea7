"""Each kind of change has the stated effect on a resumed run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.parts import ResumeEffect
from robo_orchard_lab.experiment.resume_diff import differences
from robo_orchard_lab.pipeline.errors import StateError
from tiny import equal, weights

DOCUMENT: dict[str, Any] = {
    "model": {"class_type": "MLP", "inputs": 2, "hidden": [8], "outputs": 3},
    "data": {
        "train": {
            "dataset": {"class_type": "Spirals", "size": 80},
            "batch_size": 8,
            "shuffle": True,
        },
        "evaluation": {"val": {"dataset": {"class_type": "Spirals", "size": 8, "seed": 1}}},
    },
    "batch_processor": {
        "class_type": "SupervisedProcessor",
        "loss": {"class_type": "torch.nn:CrossEntropyLoss"},
    },
    "optimizer": {"class_type": "torch.optim:SGD", "lr": 0.1, "momentum": 0.9},
    "lr_scheduler": {"class_type": "torch.optim.lr_scheduler:StepLR", "step_size": 2, "gamma": 0.5},
    "hooks": {
        "validation": {"class_type": "ValidationHook", "every": "4 steps"},
        "stats": {"class_type": "StatsMonitor"},
        "log": {"class_type": "MetricsLogger", "every": "2 steps"},
        "clip": {"class_type": "GradientClippingHook", "max_norm": 0.5},
    },
    "trainer": {"max_step": 3},
}
"""Saved after three steps of ten in an epoch."""

Outcome = Literal["same weights", "other weights", "refused"]

CHANGES: list[tuple[str, Any, ResumeEffect, Outcome]] = [
    ("name", "other", "harmless", "same weights"),
    ("hooks.validation.every", "1 step", "harmless", "same weights"),
    ("hooks.stats.grad_norm", False, "harmless", "same weights"),
    ("hooks.log.every", "1 step", "harmless", "same weights"),
    ("hooks.summary", {"class_type": "ModelSummary"}, "harmless", "same weights"),
    ("hooks.log", None, "harmless", "same weights"),
    ("checkpoint.keep_last", 1, "harmless", "same weights"),
    ("data.train.num_workers", 1, "harmless", "same weights"),
    ("data.order.allow_other_batch_size", True, "harmless", "same weights"),
    ("data.evaluation.val.batch_size", 4, "harmless", "same weights"),
    ("accelerator.find_unused_parameters", True, "harmless", "same weights"),
    ("hooks.clip.max_norm", 0.01, "trajectory", "other weights"),
    ("hooks.clip", None, "trajectory", "other weights"),
    ("data.train.dataset.noise", 0.5, "trajectory", "other weights"),
    ("data.train.dataset.size", 81, "trajectory", "refused"),
    ("data.train.batch_size", 4, "trajectory", "refused"),
    ("data.train.drop_last", True, "trajectory", "same weights"),
    ("accelerator.gradient_accumulation_steps", 2, "trajectory", "other weights"),
    ("lr_scheduler.every", "epoch", "trajectory", "other weights"),
    ("model.hidden", [9], "trajectory", "refused"),
    ("seed", 1, "impossible", "refused"),
    ("data.train.shuffle", False, "impossible", "refused"),
    ("data.order.keyed_by", "sample", "impossible", "refused"),
    ("optimizer.lr", 0.3, "trajectory", "other weights"),
    ("optimizer.momentum", 0.1, "impossible", "same weights"),
    ("optimizer.class_type", "torch.optim:RMSprop", "impossible", "refused"),
    ("lr_scheduler.step_size", 4, "trajectory", "other weights"),
    ("lr_scheduler", None, "trajectory", "other weights"),
    ("hooks.stats", None, "impossible", "refused"),
    ("hooks.average", {"class_type": "EMA"}, "impossible", "refused"),
    ("checkpoint", None, "impossible", "refused"),
]


def changed(document: dict[str, Any], place: str, value: Any) -> ExperimentConfig:
    """Return the experiment with a changed value; None removes a hook."""
    keys = place.split(".")

    def with_it(inside: Any, keys: list[str]) -> Any:
        key, *others = keys
        found = dict(inside or {})
        if others:
            return {**found, key: with_it(found.get(key), others)}
        if value is None and place.startswith("hooks."):
            del found[key]
            return found
        return {**found, key: value}

    plain = with_it(document, keys)
    if place == "optimizer.class_type":
        plain["optimizer"] = {"class_type": value, "lr": 0.1}
    return ExperimentConfig.from_dict(plain)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Return the folder of a run of three steps, and the weights of a run of six."""
    folder = tmp_path_factory.mktemp("runs")
    ExperimentConfig.from_dict(DOCUMENT).build(run_folder=folder / "first").trainer()
    uninterrupted = changed(DOCUMENT, "trainer.max_step", 6).build(run_folder=folder / "straight")
    uninterrupted.trainer()
    return folder / "first", weights(uninterrupted.trainer.model)


@pytest.mark.parametrize(
    ("place", "value", "resume", "outcome"), CHANGES, ids=[f"{c[0]}={c[1]}"[:40] for c in CHANGES]
)
def test_each_change_has_the_stated_effect_on_a_run(
    saved: tuple[Path, list[torch.Tensor]],
    tmp_path: Path,
    place: str,
    value: Any,
    resume: ResumeEffect,
    outcome: Outcome,
) -> None:
    """Harmless changes keep the uninterrupted run's weights, and impossible changes never alter
    them.
    """
    before = ExperimentConfig.from_dict(DOCUMENT)
    after = changed(DOCUMENT, place, value)
    (found,) = differences(before.to_dict(), after.to_dict())[:1]
    assert found.resume == resume
    shutil.copytree(saved[0], tmp_path / "run", symlinks=True)
    longer = after.replace(**{"trainer.max_step": 6})
    try:
        trainer = longer.build(run_folder=tmp_path / "run").trainer
    except StateError:
        assert outcome == "refused"
        return
    assert trainer.progress.global_step_id == 3
    trainer()
    same = equal(weights(trainer.model), saved[1])
    assert outcome == ("same weights" if same else "other weights")
