"""Behavior cloning with action chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from robo_orchard_lab.policy.policy import STATE, Policy, Statistics, mean_without_padding


class BehaviorCloning(Policy):
    """MLP from the state to a chunk of actions, trained with the L1 error.

    Each hidden layer is a linear layer, layer normalization and GELU.

    >>> statistics = {
    ...     name: {"mean": [0.0] * size, "std": [1.0] * size}
    ...     for name, size in {"observation.state": 39, "action": 4}.items()
    ... }
    >>> policy = BehaviorCloning(statistics)
    >>> policy.predict_actions({"observation.state": torch.zeros(2, 39)}).shape
    torch.Size([2, 8, 4])

    Args:
        statistics: of the dataset, by feature: ``{from_data: statistics}`` in a file.
        inputs: names of vector features that are concatenated to the state.
        chunk_size: predicted frames, T.
        n_action_steps: frames that are executed before the next prediction.
        hidden: widths of the hidden layers; an empty list makes a linear policy.
    """

    def __init__(
        self,
        statistics: Statistics,
        inputs: Sequence[str] = (STATE,),
        chunk_size: int = 8,
        n_action_steps: int = 4,
        hidden: Sequence[int] = (256, 256, 256),
    ) -> None:
        super().__init__(
            statistics,
            inputs=inputs,
            chunk_size=chunk_size,
            n_action_steps=n_action_steps,
            hidden=[*hidden],
        )
        widths = [self.state_dim, *hidden]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.LayerNorm(next_width), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], chunk_size * self.action_dim))

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean L1 error of normalized actions."""
        actions, padding = self.normalized_actions(batch)
        return mean_without_padding((self.predict_normalized(batch) - actions).abs(), padding)

    def predict_normalized(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return normalized actions of shape (B, T, A)."""
        flat: torch.Tensor = self.layers(self.normalized_state(observation))
        return flat.reshape(-1, self.chunk_size, self.action_dim)
