"""Normalization of observations and actions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robo_orchard_lab.policy import Normalizer


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_inverse_restores_raw_values(mode: Any) -> None:
    """The inverse of a normalized value is the value, in both modes."""
    statistics = {"mean": [1.0, -5.0], "std": [2.0, 0.5], "min": [-4.0, -6.0], "max": [8.0, -4.0]}
    normalizer = Normalizer(statistics, mode)
    values = torch.randn(16, 7, 2) * 3
    torch.testing.assert_close(normalizer.inverse(normalizer(values)), values)


def test_modes_map_to_their_ranges() -> None:
    """Mean and standard deviation map to 0 and 1; minimum and maximum map to -1 and 1."""
    statistics = {"mean": [1.0], "std": [2.0], "min": [-4.0], "max": [8.0]}
    assert Normalizer(statistics)(torch.tensor([1.0, 3.0])).tolist() == [0.0, 1.0]
    by_range = Normalizer(statistics, "min_max")
    assert by_range(torch.tensor([-4.0, 2.0, 8.0])).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_constant_feature_is_restored_and_does_not_amplify_noise(mode: Any) -> None:
    """A feature without variance normalizes to about 0 and returns to its constant."""
    statistics = {"mean": [0.7], "std": [1e-9], "min": [0.7], "max": [0.7]}
    normalizer = Normalizer(statistics, mode)
    assert normalizer(torch.tensor([0.7 + 1e-6])).abs().item() < 1e-5
    assert normalizer.inverse(torch.tensor([0.0])).item() == pytest.approx(0.7)


def test_limit_clamps_both_sides() -> None:
    """Normalized values outside of the limit become the limit."""
    normalizer = Normalizer({"mean": [0.0], "std": [0.1]}, limit=5.0)
    values = torch.tensor([-9.0, -0.4, 0.4, 9.0])
    torch.testing.assert_close(normalizer(values), torch.tensor([-5.0, -4.0, 4.0, 5.0]))


def test_image_statistics_broadcast_over_pixels() -> None:
    """Statistics of shape (3, 1, 1) normalize the channels of images."""
    statistics = {"mean": [[[0.0]], [[0.5]], [[1.0]]], "std": [[[1.0]], [[0.5]], [[0.25]]]}
    normalized = Normalizer(statistics)(torch.ones(2, 3, 4, 5))
    assert normalized[:, :, 3, 4].tolist() == [[1.0, 1.0, 0.0]] * 2


def test_statistics_are_part_of_the_state_dict() -> None:
    """Loaded weights bring their own statistics."""
    source = Normalizer({"mean": [3.0], "std": [2.0]})
    target = Normalizer({"mean": [0.0], "std": [1.0]})
    target.load_state_dict(source.state_dict())
    assert target(torch.tensor([5.0])).item() == 1.0


@pytest.mark.parametrize(
    ("statistics", "mode", "message"),
    [
        ({"mean": [0.0]}, "mean_std", "expected the statistic 'std', found mean"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean_std", "finite .*mean = .nan"),
        ({"min": [0.0], "max": [float("inf")]}, "min_max", "finite .*max = .inf"),
        ({"mean": [0.0, 1.0], "std": [1.0]}, "mean_std", r"of one shape, found \[2\] and \[1\]"),
        ({"mean": [0.0], "std": [1.0]}, "minmax", "mean_std or min_max, found 'minmax'"),
    ],
)
def test_invalid_statistics_are_refused(statistics: Any, mode: Any, message: str) -> None:
    """Missing, non-finite and inconsistent statistics are errors that name the statistic."""
    with pytest.raises(ValueError, match=message):
        Normalizer(statistics, mode)
