"""A tiny policy for the environment of `reaching`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from tiny import make_trainer


class ReachPolicy(torch.nn.Module):
    """Policy that moves towards the goal, as far as its weight is above 0.

    Args:
        gain: initial weight.
        noise: standard deviation of noise on the actions.
        bad_x: goals right of this coordinate get NaN actions.
        raises: raise an error in each prediction.
    """

    def __init__(
        self,
        gain: float = 1.0,
        noise: float = 0.0,
        chunk_size: int = 4,
        n_action_steps: int = 2,
        bad_x: float | None = None,
        raises: bool = False,
        action_size: int = 2,
    ) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(float(gain)))
        self.noise, self.bad_x, self.raises = noise, bad_x, raises
        self.chunk_size, self.n_action_steps = chunk_size, n_action_steps
        self.action_size = action_size
        self.config = {
            "class_type": "reaching_policy:ReachPolicy",
            **{"gain": gain, "noise": noise, "n_action_steps": n_action_steps},
        }

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        predicted = self.predict_actions(batch)
        return (predicted - batch["action"]).abs().mean()

    def predict_actions(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.raises:
            raise ValueError("the policy has no plan")
        state = observation["observation.state"]
        actions = self.gain * (state[:, None, 2:] - state[:, None, :2]) * 2
        actions = actions.repeat(1, self.chunk_size, 1)
        actions = actions + self.noise * torch.randn_like(actions)
        if self.bad_x is not None:  # episodes whose goal is right of it
            actions = actions.masked_fill((state[:, 2] > self.bad_x)[:, None, None], torch.nan)
        rest = max(0, self.action_size - 2)
        return torch.nn.functional.pad(actions, (0, rest))[..., : self.action_size]


def demonstrations(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Return samples whose actions fit a gain of 1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(count, 4, generator=generator) * 2 - 1
    actions = (2 * (states[:, None, 2:] - states[:, None, :2])).repeat(1, 4, 1)
    return [
        {"observation.state": state, "action": action}
        for state, action in zip(states, actions, strict=True)
    ]


class Demonstrations(Dataset[dict[str, torch.Tensor]]):
    """Dataset of `demonstrations`, for experiment files."""

    def __init__(self) -> None:
        self.samples = demonstrations()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def make_policy_trainer(hooks: Any, policy: ReachPolicy, **options: Any) -> HookBasedTrainer:
    """Return a trainer of a policy on 4 batches of demonstrations."""
    return make_trainer(
        hooks,
        model=policy,
        loader=DataLoader(Demonstrations(), batch_size=4),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda model, batch: (None, model(batch))
        ),
        **options,
    )
