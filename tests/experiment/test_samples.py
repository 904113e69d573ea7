"""The sample dataset and model of a first experiment."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor


def test_the_same_arguments_give_the_same_points() -> None:
    """Equal seeds give equal points, and other seeds give other points."""
    first, again, other = Spirals(50), Spirals(50), Spirals(50, seed=1)
    assert all(torch.equal(first[i][0], again[i][0]) for i in range(50))
    assert not any(torch.equal(first[i][0], other[i][0]) for i in range(50))


def test_global_rng_is_not_used() -> None:
    """Creating and reading the dataset does not change torch's RNG."""
    before = torch.get_rng_state()
    _ = Spirals(10)[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_points_lie_on_their_arms_up_to_noise() -> None:
    """Without noise all points are within 1 of the centre, with equal arms."""
    spirals = Spirals(300, arms=4, noise=0)
    points = torch.stack([spirals[index][0] for index in range(300)])
    assert points.norm(dim=1).max() <= 1
    assert torch.bincount(spirals.labels).tolist() == [75] * 4
    off = Spirals(300, arms=4, noise=0.1).points - points
    assert off.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"arms": 0}, "arms must be >= 1, got 0"),
        ({"noise": -0.1}, "noise must be a number >= 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be a number >= 0, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    """The error names the argument."""
    with pytest.raises(ValueError, match=message):
        Spirals(**arguments)  # type: ignore[arg-type]


def test_the_model_has_a_relu_between_each_two_layers() -> None:
    """Without hidden layers the model is one linear layer, and a width below 1 is refused."""
    assert [type(layer).__name__ for layer in MLP(2, [5], 3).layers] == ["Linear", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in MLP(2, [], 3).layers] == ["Linear"]
    with pytest.raises(ValueError, match=r"must be >= 1, got \[2, 0, 3\]"):
        MLP(2, [0], 3)


def test_the_model_learns_within_seconds() -> None:
    """After ten epochs, 19 of 20 unseen points are classified correctly."""
    torch.manual_seed(0)
    model = MLP(2, [64, 64], 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(Spirals(), batch_size=64, shuffle=True, drop_last=True)
    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        loader,
        SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10 * len(loader)),
        max_epoch=10,
    )()
    unseen = Spirals(600, seed=1)
    with torch.no_grad():
        right = (model(unseen.points).argmax(1) == unseen.labels).float().mean()
    assert right >= 0.95
