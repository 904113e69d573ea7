"""The digits example as a script and as a file trains bit-identical weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robo_orchard_core.utils.config import formats
from robo_orchard_lab.experiment import ExperimentConfig
from tiny import equal, weights

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"
FILE = EXAMPLE / "digits.yaml"
TRUST = "digits_parts"
SMALL = {
    "seed": 3,
    "data.train.batch_size": 8,
    "data.train.dataset.random_images": 24,
    "data.evaluation.val.dataset.random_images": 8,
    "trainer.max_epoch": 2,
}


@pytest.fixture(autouse=True)
def example_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example's modules importable, and run in a folder of the test."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def by_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[torch.Tensor]]:
    """Return the weights trained by the script with these options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        patch.chdir(tmp_path_factory.mktemp("script"))
        from train import DatasetConfig, TrainerConfig, train

        images = DatasetConfig(pipeline_test=True, dummy_train_imgs=24, dummy_val_imgs=8)
        trainer = train(TrainerConfig(dataset=images, batch_size=8, max_epoch=2, seed=3))
        yield weights(trainer.model)


def trained(experiment: ExperimentConfig, folder: str) -> list[torch.Tensor]:
    built = experiment.build(run_folder=folder)
    built.trainer()
    return weights(built.model)


def in_format(format_: Any, folder: Path) -> Path:
    """Write the file in another format."""
    document = yaml.safe_load(FILE.read_text("utf-8"))
    text = json.dumps(document) if format_ == "json" else formats.write(document, format_)
    path = folder / f"digits.{format_}"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("format_", ["yaml", "toml", "json"])
def test_the_file_trains_as_the_script(
    format_: str, by_script: list[torch.Tensor], tmp_path: Path
) -> None:
    """The file in each format, and its saved copy, trains the script's weights."""
    path = FILE if format_ == "yaml" else in_format(format_, tmp_path)
    experiment = ExperimentConfig.load(path, trust=TRUST, overrides=SMALL)
    assert equal(trained(experiment, "first"), by_script)
    resolved = tmp_path / f"resolved.{format_}"
    experiment.save(resolved)
    again = ExperimentConfig.load(resolved, trust=TRUST)
    assert again == experiment
    assert equal(trained(again, "again"), by_script)


def test_file_has_the_defaults_of_the_script() -> None:
    """The file's values equal the defaults of the script's configuration."""
    from train import TrainerConfig

    script = TrainerConfig()
    file: Any = ExperimentConfig.load(FILE, trust=TRUST)
    assert script.seed == file.seed
    assert script.batch_size == file.data.train.batch_size
    assert script.num_workers == file.data.train.num_workers
    assert script.dataset.data_root == file.data.train.dataset.folder
    assert script.max_epoch == file.trainer.max_epoch
    assert script.learning_rate == file.optimizer.lr == file.lr_scheduler.max_lr
    assert script.max_grad_norm == file.hooks["clip"].max_norm


def test_run_writes_to_its_folder(tmp_path: Path) -> None:
    """Metrics, TensorBoard files, checkpoints and the best weights are in the run folder only."""
    trained(ExperimentConfig.load(FILE, trust=TRUST, overrides=SMALL), "runs/one")
    written = {path.name for path in (tmp_path / "runs" / "one").iterdir()}
    assert written >= {"metrics.jsonl", "tensorboard", "best.safetensors", "checkpoints"}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
