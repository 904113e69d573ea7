"""Diffusion policy: denoise chunks of actions, given the state.

- :class:`NoiseSchedule`: noise levels of training, and sampling by DDIM
- :class:`TemporalUNet`: denoiser, a 1-D temporal U-Net with a condition (FiLM)
- :class:`DiffusionPolicy`: policy of both

Sources: DDPM (Ho et al. 2020), the squared cosine schedule (Nichol and Dhariwal 2021), DDIM (Song
et al. 2021), Diffusion Policy (Chi et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from robo_orchard_lab.policy.policy import (
    STATE,
    Policy,
    Statistics,
    mean_without_padding,
    sinusoidal_embedding,
)

GROUPS = 8
"""Groups of group normalization; channels are multiples."""


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


class NoiseSchedule(nn.Module):
    """Noise levels of diffusion: ``noisy = sqrt(a) * clean + sqrt(1 - a) * noise``.

    The share ``a`` of the signal follows the squared cosine schedule, from almost 1 at level 0 to
    almost 0 at the last level.

    Args:
        levels: number of noise levels, >= 2.
    """

    signal: torch.Tensor

    def __init__(self, levels: int = 100) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"expected at least 2 noise levels, found {levels}")
        self.levels = levels
        time = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
        # Derived from the arguments, hence not in the state_dict.
        self.register_buffer("signal", (1 - betas).cumprod(0).float(), persistent=False)

    def add_noise(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        """Return noisy values (B, ...) at the noise levels (B,)."""
        share = self.signal[level].reshape(-1, *[1] * (clean.dim() - 1))
        return share.sqrt() * clean + (1 - share).sqrt() * noise

    def sample(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        noise: torch.Tensor,
        steps: int,
        limit: float | None = None,
    ) -> torch.Tensor:
        """Return samples from noise of shape (B, ...), by DDIM without added noise.

        Args:
            denoise: maps noisy values (B, ...) and noise levels (B,) to an estimate of the clean
                values.
            noise: standard normal, on the device of this module.
            steps: calls of ``denoise``, from 1 to ``levels``.
            limit: clamp estimates of clean values to [-limit, limit].
        """
        values = noise
        last = self.levels - 1
        levels = [round(last * (1 - step / max(steps - 1, 1))) for step in range(steps)]
        for level, next_level in zip(levels, [*levels[1:], None], strict=True):
            share = self.signal[level]
            clean = denoise(values, torch.full((values.shape[0],), level, device=values.device))
            if limit is not None:
                clean = clean.clamp(-limit, limit)
            if next_level is None:
                return clean
            direction = (values - share.sqrt() * clean) / (1 - share).sqrt()
            next_share = self.signal[next_level]
            values = next_share.sqrt() * clean + (1 - next_share).sqrt() * direction
        return values


class DiffusionPolicy(Policy):
    """Denoising diffusion over chunks of actions, with a 1-D temporal U-Net.

    Actions are normalized to [-1, 1] by their range. The U-Net estimates the clean actions; the
    loss is the squared error of the estimate. `predict_actions` starts from noise of torch's RNG.
    Evaluate the weights of the hook ``EMA``; its default is the warm-up of diffusion models.

    >>> statistics = {
    ...     name: {"mean": [0.0] * size, "std": [1.0] * size, "min": [-1] * size, "max": [1] * size}
    ...     for name, size in {"observation.state": 39, "action": 4}.items()
    ... }
    >>> policy = DiffusionPolicy(statistics)
    >>> policy.predict_actions({"observation.state": torch.zeros(2, 39)}).shape
    torch.Size([2, 8, 4])

    Args:
        statistics: of the dataset, by feature: ``{from_data: statistics}`` in a file.
        inputs: names of vector features that are concatenated to the state.
        chunk_size: predicted frames, T; a multiple of ``2 ** (len(channels) - 1)``.
        n_action_steps: frames that are executed before the next prediction.
        channels: channels of the U-Net at each resolution.
        condition_dim: size of the encoded state and of the encoded noise level.
        noise_levels: noise levels of training.
        inference_steps: evaluations of the U-Net per prediction.
    """

    def __init__(
        self,
        statistics: Statistics,
        inputs: Sequence[str] = (STATE,),
        chunk_size: int = 8,
        n_action_steps: int = 4,
        channels: Sequence[int] = (32, 64),
        condition_dim: int = 64,
        noise_levels: int = 100,
        inference_steps: int = 10,
    ) -> None:
        super().__init__(
            statistics,
            inputs=inputs,
            chunk_size=chunk_size,
            n_action_steps=n_action_steps,
            action_normalization="min_max",
            channels=[*channels],
            condition_dim=condition_dim,
            noise_levels=noise_levels,
            inference_steps=inference_steps,
        )
        if chunk_size % 2 ** (len(channels) - 1):
            raise ValueError(
                f"expected a chunk_size that {len(channels) - 1} halvings divide, found "
                f"{chunk_size}; channels has {len(channels)} resolutions"
            )
        if not 1 <= inference_steps <= noise_levels:
            raise ValueError(
                f"expected 1 <= inference_steps <= noise_levels, found {inference_steps} and "
                f"{noise_levels}"
            )
        self.inference_steps = inference_steps
        self.schedule = NoiseSchedule(noise_levels)
        self.state_encoder = nn.Sequential(
            nn.Linear(self.state_dim, 2 * condition_dim),
            nn.LayerNorm(2 * condition_dim),
            nn.SiLU(),
            nn.Linear(2 * condition_dim, condition_dim),
        )
        self.unet = TemporalUNet(self.action_dim, condition_dim, channels)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean squared error of denoised actions at random noise levels."""
        actions, padding = self.normalized_actions(batch)
        condition = self.state_encoder(self.normalized_state(batch))
        noise = torch.randn_like(actions)
        size = (actions.shape[0],)
        level = torch.randint(self.schedule.levels, size, device=actions.device)
        noisy = self.schedule.add_noise(actions, noise, level)
        error = self.unet(noisy, level, condition) - actions
        return mean_without_padding(error.square(), padding)

    def predict_normalized(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return normalized actions of shape (B, T, A) from new noise."""
        condition = self.state_encoder(self.normalized_state(observation))
        noise = torch.randn(
            condition.shape[0],
            self.chunk_size,
            self.action_dim,
            device=condition.device,
            dtype=condition.dtype,
        )
        return self.schedule.sample(
            lambda noisy, level: self.unet(noisy, level, condition),
            noise,
            self.inference_steps,
            limit=1.0,
        )
