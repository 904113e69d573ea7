"""1-D temporal U-Net with a condition (FiLM), as in Diffusion Policy (Chi et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

GROUPS = 8
"""Groups of group normalization; channels are multiples."""


def sinusoidal_embedding(position: torch.Tensor, size: int) -> torch.Tensor:
    """Return sines and cosines of positions: shape (...) to (..., size), with an even size.

    Wavelengths grow geometrically from 2 pi to 10,000 times 2 pi (Vaswani et al. 2017).

    >>> sinusoidal_embedding(torch.tensor([0.0]), 4)
    tensor([[0., 0., 1., 1.]])
    """
    exponent = torch.arange(size // 2, device=position.device, dtype=torch.float32) / (size // 2)
    angle = position.unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TemporalUNet(nn.Module):
    """U-Net over the frames of a chunk, conditioned on a vector and on a noise level.

    Args:
        dim: values per frame.
        condition_dim: size of the condition, even.
        channels: channels at each resolution, multiples of 8; each further one halves the frames.
    """

    def __init__(self, dim: int, condition_dim: int, channels: Sequence[int]) -> None:
        super().__init__()
        if not channels or any(count < 1 or count % GROUPS for count in channels):
            raise ValueError(f"expected channels that are multiples of {GROUPS}, found {channels}")
        if condition_dim < 2 or condition_dim % 2:
            raise ValueError(f"expected an even condition_dim, found {condition_dim}")
        self.condition_dim = condition_dim
        self.level_encoder = nn.Sequential(
            nn.Linear(condition_dim, 2 * condition_dim),
            nn.SiLU(),
            nn.Linear(2 * condition_dim, condition_dim),
        )
        both = 2 * condition_dim
        self.enter = nn.Conv1d(dim, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(_Residual(count, count, both) for count in channels)
        self.downsample = nn.ModuleList(
            nn.Conv1d(count, wider, 3, stride=2, padding=1) for count, wider in pairwise(channels)
        )
        self.middle = _Residual(channels[-1], channels[-1], both)
        self.up_blocks = nn.ModuleList(_Residual(2 * count, count, both) for count in channels)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose1d(wider, count, 4, stride=2, padding=1)
            for count, wider in pairwise(channels)
        )
        self.leave = nn.Conv1d(channels[0], dim, 1)

    def forward(
        self, values: torch.Tensor, level: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """Return an output of the shape of the values.

        Args:
            values: noisy values (B, T, dim).
            level: noise levels (B,).
            condition: (B, condition_dim).
        """
        embedded = sinusoidal_embedding(level.to(condition.dtype), self.condition_dim)
        both = functional.silu(torch.cat([self.level_encoder(embedded), condition], dim=1))
        hidden = self.enter(values.transpose(1, 2))
        skipped = []
        for depth, block in enumerate(self.down_blocks):
            if depth > 0:
                hidden = self.downsample[depth - 1](hidden)
            hidden = block(hidden, both)
            skipped.append(hidden)
        hidden = self.middle(hidden, both)
        for depth in reversed(range(len(self.up_blocks))):
            hidden = self.up_blocks[depth](torch.cat([hidden, skipped[depth]], dim=1), both)
            if depth > 0:
                hidden = self.upsample[depth - 1](hidden)
        output: torch.Tensor = self.leave(hidden)
        return output.transpose(1, 2)


class _Residual(nn.Module):
    """Two convolutions with group normalization; the condition scales and shifts the first."""

    def __init__(self, channels: int, out_channels: int, condition_dim: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, out_channels, 3, padding=1)
        self.first_norm = nn.GroupNorm(GROUPS, out_channels)
        self.film = nn.Linear(condition_dim, 2 * out_channels)
        self.second = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        self.second_norm = nn.GroupNorm(GROUPS, out_channels)
        is_equal = channels == out_channels
        self.shortcut = nn.Identity() if is_equal else nn.Conv1d(channels, out_channels, 1)

    def forward(self, values: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition).unsqueeze(-1).chunk(2, dim=1)
        hidden = functional.silu(self.first_norm(self.first(values)))
        hidden = self.second_norm(self.second(hidden * (1 + scale) + shift))
        result: torch.Tensor = functional.silu(hidden) + self.shortcut(values)
        return result
