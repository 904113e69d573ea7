"""Sample predictions of an image classifier."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import SamplePredictionsConfig
from robo_orchard_lab.report.story import read_story

SHADES = [0, 51, 102, 255]


def forward(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that predict class 1 for light images, and a loss that changes nothing."""
    images, _ = batch
    share = images.mean((1, 2, 3)) * 0.5 + 0.5
    logits = torch.stack([1 - share, share], 1).log()
    return logits, (model(share[:, None]) * 0).sum()


def train(folder: Path, config: SamplePredictionsConfig) -> None:
    """Train two steps on four images of one shade each, of classes 0, 1, 1, 1."""
    images = torch.tensor(SHADES).float().reshape(4, 1, 1, 1).expand(4, 3, 4, 4) / 255
    data = torch.utils.data.TensorDataset((images - 0.5) / 0.5, torch.tensor([0, 1, 1, 1]))
    model = torch.nn.Linear(1, 1)
    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        torch.utils.data.DataLoader(data, batch_size=4),
        SimpleBatchProcessor.from_callable(forward),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[config],
        run_folder=folder,
        max_epoch=2,
    )()


def test_wrong_predictions_come_first(tmp_path: Path) -> None:
    """Grid and table have the same order, wrong predictions first, with names and probabilities."""
    config = SamplePredictionsConfig(labels=["dark", "light"], mean=[0.5], std=[0.5], max_images=3)
    train(tmp_path, config)
    entries = map(json.loads, (tmp_path / "media/index.jsonl").read_text().splitlines())
    files = {(entry["name"], entry["step"]): entry for entry in entries}
    assert {*files} == {(name, step) for name in ("samples", "samples/labels") for step in (1, 2)}
    assert files["samples", 2]["caption"] == "2 of 4 right"
    text = (tmp_path / "media" / files["samples/labels", 2]["file"]).read_text()
    assert [*csv.reader(text.splitlines())][1:] == [
        ["1", "light", "dark", "0.800", "False"],
        ["2", "light", "dark", "0.600", "False"],
        ["3", "dark", "dark", "1.000", "True"],
    ]
    pixels = np.asarray(Image.open(tmp_path / "media" / files["samples", 2]["file"]))
    assert {*np.unique(pixels)} <= {0, 51, 102, 255}
    columns = [int(pixels[pixels.shape[0] // 4, x, 0]) for x in range(pixels.shape[1])]
    assert columns.index(51) < columns.index(102)
    shown = {(item["name"], item["step"]): item for item in read_story(tmp_path)["media"]}
    assert shown["samples", 2]["data"].startswith("data:image/png;base64,")
    assert shown["samples/labels", 1]["columns"][1] == "truth"


def test_other_outputs_end_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Outputs that are no logits, or an unknown key, are reported once; the training continues."""
    train(tmp_path / "a", SamplePredictionsConfig(targets="0"))
    train(tmp_path / "b", SamplePredictionsConfig(logits="logits"))
    assert not (tmp_path / "a" / "media").exists()
    errors = [record.getMessage() for record in caplog.records if "samples" in record.getMessage()]
    assert len(errors) == 2
    assert (
        "expected logits (B, C), targets (B) and images (B, ...), found shapes (4, 2)" in errors[0]
    )
    assert "no args.model_outputs.logits" in errors[1]


def test_mean_requires_std() -> None:
    """A mean without a standard deviation is refused."""
    with pytest.raises(ValueError, match="expected mean and std together"):
        SamplePredictionsConfig(mean=[0.5])
