"""Noise levels, sampling by DDIM, and the diffusion policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robo_orchard_lab.policy import DiffusionPolicy
from robo_orchard_lab.policy.diffusion import NoiseSchedule
from robot_batches import make_statistics


def test_noise_grows_from_almost_none_to_almost_all() -> None:
    """The share of the signal falls with the level, from 1 to 0, and variances add up."""
    schedule = NoiseSchedule(100)
    assert schedule.signal[0] > 0.999
    assert schedule.signal[-1] < 1e-4
    assert (schedule.signal.diff() < 0).all()
    clean, noise = torch.randn(2, 20_000, 3, generator=torch.Generator().manual_seed(0))
    noisy = schedule.add_noise(clean, noise, torch.full((20_000,), 60))
    assert noisy.var().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("steps", "error"), [(10, 0.3), (100, 0.04)])
def test_ddim_recovers_a_gaussian(steps: int, error: float) -> None:
    """With the exact denoiser of a Gaussian, samples have its mean; few steps shrink its std."""
    schedule = NoiseSchedule(100)
    mean, std = torch.tensor([0.5, -2.0]), torch.tensor([0.2, 1.5])

    def denoise(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        share = schedule.signal[level].unsqueeze(1)
        gain = share.sqrt() * std**2 / (share * std**2 + 1 - share)
        return mean + gain * (noisy - share.sqrt() * mean)

    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    samples = schedule.sample(denoise, noise, steps)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), std, atol=0, rtol=error)


def test_ddim_recovers_both_modes() -> None:
    """With the exact denoiser of two points, samples are these points, in their proportion."""
    schedule = NoiseSchedule(100)
    points, weights = torch.tensor([-1.0, 1.0]), torch.tensor([0.3, 0.7])

    def denoise(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        share = schedule.signal[level].unsqueeze(1)
        distance = (noisy - share.sqrt() * points).square() / (2 * (1 - share))
        return ((weights.log() - distance).softmax(dim=1) @ points).unsqueeze(1)

    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    samples = schedule.sample(denoise, noise, 50)
    torch.testing.assert_close(samples.abs(), torch.ones_like(samples), atol=0.01, rtol=0)
    assert (samples > 0).float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_estimates_are_clamped() -> None:
    """With a limit, no sample lies outside of it."""
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    samples = NoiseSchedule(10).sample(lambda noisy, _: 9 * noisy, noise, 5, limit=1.0)
    assert samples.abs().max() <= 1.0


def test_policy_keeps_two_ways_to_act() -> None:
    """Trained on demonstrations that go left or right, samples go left or right, not straight."""
    torch.manual_seed(0)
    statistics: Any = make_statistics(state=1, action=1)
    statistics["action"] |= {"min": [-1.0], "max": [1.0]}
    policy = DiffusionPolicy(
        statistics, channels=[16], condition_dim=16, chunk_size=2, n_action_steps=1
    )
    side = torch.ones(64, 1, 1)
    side[:32] = -1.0
    batch = {"observation.state": torch.ones(64, 1), "action": side.expand(-1, 2, -1)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        policy(batch).backward()
        optimizer.step()
    actions = policy.predict_actions({"observation.state": torch.ones(400, 1)})
    assert (actions.abs() > 0.8).float().mean() > 0.9
    assert 0.3 < (actions > 0).float().mean() < 0.7
    assert ((actions[:, 0] > 0) == (actions[:, 1] > 0)).float().mean() > 0.9


def test_prediction_is_a_function_of_the_rng() -> None:
    """The same seed predicts the same actions; another seed predicts other actions."""
    policy = DiffusionPolicy(make_statistics(), channels=[16, 32], condition_dim=16)
    observation = {"observation.state": torch.zeros(2, 3)}
    predicted = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        predicted.append(policy.predict_actions(observation))
    assert torch.equal(predicted[0], predicted[1])
    assert not torch.equal(predicted[0], predicted[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": [8, 8, 8, 8, 8]}, "4 halvings divide, found 8"),
        ({"channels": [12]}, r"multiples of 8, found .12"),
        ({"channels": []}, "multiples of 8, found"),
        ({"condition_dim": 7}, "even condition_dim, found 7"),
        ({"inference_steps": 101}, "found 101 and 100"),
        ({"noise_levels": 1, "inference_steps": 1}, "at least 2 noise levels, found 1"),
    ],
)
def test_invalid_sizes_are_refused(arguments: Any, message: str) -> None:
    """Sizes that the U-Net or the sampler can't use are errors at construction."""
    with pytest.raises(ValueError, match=message):
        DiffusionPolicy(make_statistics(), **arguments)
