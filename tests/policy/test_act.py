"""ACT on images of several cameras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robo_orchard_lab.data.lerobot import LeRobotWriter
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.policy import ACT
from robot_batches import make_batch, make_statistics

pytest.importorskip("torchvision")

SMALL: dict[str, Any] = {
    "dim": 16,
    "heads": 2,
    "feedforward_dim": 16,
    "encoder_layers": 1,
    "latent_dim": 4,
}


def test_every_camera_and_the_state_change_the_prediction() -> None:
    """Predictions depend on each camera, on which camera an image is from, and on the state."""
    torch.manual_seed(0)
    policy = ACT(make_statistics(cameras=["left", "right"]), **SMALL).eval()
    assert policy.cameras == ("observation.images.left", "observation.images.right")
    batch = make_batch(cameras=policy_cameras(policy))
    left, right = policy.cameras
    own = policy.predict_actions(batch)
    changes: list[dict[str, torch.Tensor]] = [
        {left: torch.zeros_like(batch[left])},
        {right: torch.zeros_like(batch[right])},
        {left: batch[right], right: batch[left]},
        {"observation.state": batch["observation.state"] + 1},
    ]
    for change in changes:
        assert (policy.predict_actions(batch | change) - own).abs().max() > 1e-4


def policy_cameras(policy: ACT) -> list[str]:
    return [name.removeprefix("observation.images.") for name in policy.cameras]


def test_position_in_the_image_changes_the_prediction() -> None:
    """A bright patch in another corner of an image gives other actions.

    Features of a patch are independent of its neighbors here: only its position differs.
    """
    torch.manual_seed(0)
    policy = ACT(make_statistics(cameras=["top"]), **SMALL).eval()
    policy.backbone = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Conv2d(3, 512, 1))
    batch = make_batch(size=2, cameras=["top"], pixels=64)
    batch["observation.state"][:] = 0.0
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :32, :32] = 1.0
    images[1, :, 32:, 32:] = 1.0
    first, second = policy.predict_actions({**batch, "observation.images.top": images})
    assert (first - second).abs().max() > 1e-4


def test_predictions_are_deterministic() -> None:
    """The latent of a prediction is 0, not random."""
    policy = ACT(make_statistics(cameras=["top"]), **SMALL)
    batch = make_batch(cameras=["top"])
    predicted = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        predicted.append(policy.predict_actions(batch))
    assert torch.equal(predicted[0], predicted[1])


def test_cameras_of_different_sizes() -> None:
    """Images need neither be square nor of one size."""
    policy = ACT(
        make_statistics(cameras=["wide", "tall"]), cameras=["observation.images.wide"], **SMALL
    )
    batch = make_batch(cameras=["wide"]) | {"observation.images.wide": torch.rand(4, 3, 32, 96)}
    assert policy.predict_actions(batch).shape == (4, 8, 2)
    both = ACT(make_statistics(cameras=["wide", "tall"]), **SMALL)
    batch["observation.images.tall"] = torch.rand(4, 3, 64, 32)
    assert both.predict_actions(batch).shape == (4, 8, 2)


def test_latent_is_penalized() -> None:
    """The KL divergence is 0 for a standard normal latent, and counts with its weight otherwise."""
    batch = make_batch(cameras=["top"])
    losses = []
    for kl_weight in (0.0, 1.0):
        torch.manual_seed(0)
        policy = ACT(make_statistics(cameras=["top"]), kl_weight=kl_weight, **SMALL).eval()
        for bias in (0.0, 2.0):
            torch.nn.init.zeros_(policy.style_head.weight)
            torch.nn.init.zeros_(policy.style_head.bias)
            policy.style_head.bias.data[: policy.latent_dim] = bias  # mean; the log variance is 0
            torch.manual_seed(1)
            losses.append(policy(batch).item())
    free, free_far, penalized, penalized_far = losses
    assert penalized == pytest.approx(free)
    assert penalized_far - free_far == pytest.approx(4 * 2.0**2 / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("cameras", "arguments", "message"),
    [
        ([], {}, "at least one camera, found no statistics of observation.images"),
        (
            ["top"],
            {"cameras": ["observation.images.tpo"]},
            "statistics of 'observation.images.tpo'",
        ),
        (["top"], {"dim": 18}, "that 4 and heads divide, found dim=18 and heads=2"),
        (["top"], {"backbone": "resnet50"}, "resnet18 or resnet34, found 'resnet50'"),
    ],
)
def test_invalid_arguments_are_refused(
    cameras: list[str], arguments: dict[str, Any], message: str
) -> None:
    """A dataset without images, an unknown camera and unusable sizes are errors at construction."""
    with pytest.raises(ValueError, match=message):
        ACT(make_statistics(cameras=cameras), **{**SMALL, **arguments})


def test_images_of_another_shape_are_refused() -> None:
    """Images as (B, H, W, 3), and a window of images, are errors that state the expected shape."""
    policy = ACT(make_statistics(cameras=["top"]), **SMALL)
    batch = make_batch(cameras=["top"])
    for shape in ((4, 32, 32, 3), (4, 2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"batch, 3, height, width\], found"):
            policy(batch | {"observation.images.top": torch.zeros(shape)})


FILE = """
model:
  class_type: ACT
  statistics: {from_data: statistics}
  chunk_size: 4
  dim: 16
  heads: 2
  feedforward_dim: 16
  encoder_layers: 1
data:
  train: {dataset: {class_type: LeRobotDataset, folder: two_arms, chunk_size: 4}, batch_size: 4}
batch_processor: {class_type: PolicyProcessor}
optimizer: {class_type: "torch.optim:AdamW", lr: 0.0001}
hooks: {losses: {class_type: LossTracker}}
trainer: {max_step: 2}
"""


def test_file_trains_on_two_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file trains ACT on a dataset with two cameras and 6-D actions, without a line of Python."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (7,)},
        "observation.images.head": {"dtype": "image", "shape": (32, 48, 3)},
        "observation.images.hand": {"dtype": "image", "shape": (64, 32, 3)},
        "action": {"dtype": "float32", "shape": (6,)},
    }
    with LeRobotWriter("two_arms", fps=30, features=features) as writer:
        for frame in range(12):
            values = {
                name: draw.integers(0, 256, feature["shape"], np.uint8)
                if feature["dtype"] == "image"
                else draw.normal(size=feature["shape"]).astype(np.float32)
                for name, feature in features.items()
            }
            writer.add_frame({**values, "task": "fold the towel"})
            if frame % 6 == 5:
                writer.save_episode()
    Path("act.yaml").write_text(FILE, "utf-8")
    run = ExperimentConfig.load("act.yaml").build(run_folder="run")
    assert isinstance(run.model, ACT)
    before = run.model.action_head.weight.clone()
    run.trainer()
    assert run.trainer.progress.global_step_id == 2
    assert not torch.equal(run.model.action_head.weight, before)
    assert run.model.cameras == ("observation.images.hand", "observation.images.head")
    assert run.model.action_dim == 6
