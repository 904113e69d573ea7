"""The digits example trains from images on disk to saved weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from launching import launch
from run_folders import Page

TRAIN = Path(__file__).resolve().parents[2] / "examples" / "digits" / "train.py"


def _train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return launch(TRAIN, *options, processes=1, folder=folder, timeout_s=1800)


def _accuracy(output: str) -> float:
    found = re.search(r"^Accuracy .*: (\d\.\d+)$", output, re.MULTILINE)
    assert found, output
    return float(found[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the folder of a run with the default configuration, and the printed accuracy."""
    folder = tmp_path_factory.mktemp("digits")
    finished = _train(folder)
    assert str(folder / "workspace" / "digits" / "report.html") in finished.stdout
    return folder, _accuracy(finished.stdout)


def test_most_unseen_digits_are_classified(trained: tuple[Path, float]) -> None:
    """After 5 epochs, at least 95 of 100 unseen digits are classified correctly."""
    assert trained[1] >= 0.95


def test_images_are_written_as_an_image_folder(trained: tuple[Path, float]) -> None:
    """All 1797 digits are RGB images of 32x32 pixels, with a fifth of each digit for validation."""
    root = trained[0] / "workspace" / "digits" / "images"
    train, val = ImageFolder(str(root / "train")), ImageFolder(str(root / "val"))
    assert (len(train), len(val)) == (1437, 360)
    counts = torch.bincount(torch.tensor(val.targets)) / torch.bincount(torch.tensor(train.targets))
    assert counts == pytest.approx(0.25, abs=0.01)
    image, _ = val[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")


def test_saved_weights_have_the_printed_accuracy(trained: tuple[Path, float]) -> None:
    """The model loaded from the file has the printed accuracy."""
    folder = trained[0] / "workspace" / "digits"
    model = models.resnet18(num_classes=10)
    load_model(model, folder / "model.safetensors")
    model.eval()
    images = ImageFolder(str(folder / "images" / "val"), lambda image: to_tensor(image) * 2 - 1)
    pixels = torch.stack([image for image, _ in images])
    with torch.no_grad():
        right = (model(pixels).argmax(1) == torch.tensor(images.targets)).float().mean()
    assert right.item() == pytest.approx(trained[1], abs=0.003)  # one image of 360


def test_random_images_run_in_seconds(tmp_path: Path) -> None:
    """The example runs in seconds and saves the options with random images and other options."""
    finished = _train(
        tmp_path,
        *("--dataset.pipeline_test", "true", "--dataset.dummy_train_imgs", "16"),
        *("--dataset.dummy_val_imgs", "8", "--batch_size", "8", "--max_epoch", "1"),
    )
    assert "epoch 1/1, step 2/2" in finished.stderr
    kept = json.loads((tmp_path / "workspace" / "digits" / "config.json").read_text("utf-8"))
    assert (kept["batch_size"], kept["dataset"]["dummy_train_imgs"]) == (8, 16)
    assert not (tmp_path / "workspace" / "digits" / "images").exists()


def test_the_example_ends_with_a_report(trained: tuple[Path, float]) -> None:
    """The page has curves, an evaluation for each epoch, and sample predictions."""
    report = trained[0] / "workspace" / "digits" / "report.html"
    [story] = Page(report.read_text()).data["runs"]
    assert {"loss/total", "train/accuracy", "eval/val/accuracy", "lr/group0"} <= {*story["series"]}
    assert len(story["evaluations"]["rows"]) == 5
    assert {(item["name"], item["kind"]) for item in story["media"]} == {
        ("samples", "image"),
        ("samples/labels", "table"),
    }
    assert (story["verdict"]["state"], story["problems"]) == ("completed", [])


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    """Two runs of one configuration save equal bytes, and a run with another seed does not."""
    weights = []
    for name, seed in (("first", "3"), ("second", "3"), ("third", "4")):
        _train(
            tmp_path,
            *("--dataset.pipeline_test", "true", "--dataset.dummy_train_imgs", "16"),
            *("--dataset.dummy_val_imgs", "8", "--batch_size", "8", "--max_epoch", "1"),
            *("--seed", seed, "--workspace_root", name),
        )
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.slow
def test_it_runs_on_two_processes(tmp_path: Path) -> None:
    """Under torchrun, only rank 0 writes the images, the weights and the accuracy."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *torchrun, TRAIN, "--max_epoch", "1", "--batch_size", "32"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    assert len(re.findall("^Accuracy ", finished.stdout, re.MULTILINE)) == 1
    _accuracy(finished.stdout)
    assert (tmp_path / "workspace" / "digits" / "model.safetensors").exists()
