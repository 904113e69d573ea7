"""Diffusion policy with a normaliser and averaged weights, as real-stanford/diffusion_policy."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from porting import EpochOrder, State, logged, trained_state
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    EMA,
    EMAConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, BATCH, HORIZON, WARMUP = 5, 8, 4, 3

Batch = dict[str, torch.Tensor]
Limits = dict[str, list[list[float]]]


class Demonstrations(Dataset[Batch]):
    """Windows of observations and actions of reaching motions, each to a random goal."""

    def __init__(self, episodes: int, seed: int, length: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        goals = 5 + 3 * torch.rand(episodes, 1, 2, generator=generator)
        time = torch.linspace(0, 1, length + HORIZON).view(1, -1, 1)
        self.actions = goals * time**2
        self.observations = torch.cat([self.actions, goals.expand_as(self.actions)], dim=-1)
        self.windows = [(episode, t) for episode in range(episodes) for t in range(length)]

    @property
    def limits(self) -> Limits:
        """Lowest and highest values by name, for the normalizers."""
        data = {"obs": self.observations, "action": self.actions}
        return {
            name: [values.amin((0, 1)).tolist(), values.amax((0, 1)).tolist()]
            for name, values in data.items()
        }

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        episode, t = self.windows[index]
        window = slice(t, t + HORIZON)
        return {"obs": self.observations[episode, t], "action": self.actions[episode, window]}


class Normalizer(nn.Module):
    """Maps the range of the training data to -1..1; the range is part of the weights' file."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: list[float], high: list[float]) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * (values - self.low) / (self.high - self.low) - 1

    def invert(self, values: torch.Tensor) -> torch.Tensor:
        return (values + 1) / 2 * (self.high - self.low) + self.low


class DiffusionPolicy(nn.Module):
    signal: torch.Tensor

    def __init__(self, limits: Limits, width: int = 32) -> None:
        super().__init__()
        self.obs_normalizer = Normalizer(*limits["obs"])
        self.action_normalizer = Normalizer(*limits["action"])
        observations, actions = len(limits["obs"][0]), len(limits["action"][0])
        self.shape = HORIZON, actions
        self.step_embedding = nn.Embedding(10, width)
        self.input = nn.Linear(observations + HORIZON * actions, width)
        self.denoiser = nn.Sequential(
            nn.Mish(), nn.GroupNorm(4, width), nn.Linear(width, HORIZON * actions)
        )
        angles = torch.linspace(0.1, 0.98, 10) * math.pi / 2
        self.register_buffer("signal", torch.cos(angles) ** 2, persistent=False)

    def predict_noise(self, obs: torch.Tensor, noisy: torch.Tensor, step: torch.Tensor) -> Any:
        hidden = self.input(torch.cat([obs, noisy.flatten(1)], dim=1)) + self.step_embedding(step)
        return self.denoiser(hidden).unflatten(1, self.shape)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss of predicting the noise in noisy actions."""
        obs, actions = self.obs_normalizer(batch["obs"]), self.action_normalizer(batch["action"])
        noise = torch.randn_like(actions)
        step = torch.randint(len(self.signal), (len(actions),), device=actions.device)
        signal = self.signal[step].view(-1, 1, 1)
        noisy = signal.sqrt() * actions + (1 - signal).sqrt() * noise
        return mse_loss(self.predict_noise(obs, noisy, step), noise)

    def predict_action(self, obs: torch.Tensor) -> torch.Tensor:
        """Denoise from fixed noise, without random numbers between the steps."""
        obs = self.obs_normalizer(obs)
        noise = torch.randn(len(obs), *self.shape, generator=torch.Generator().manual_seed(0))
        actions = noise.to(obs.device)
        for step in reversed(range(len(self.signal))):
            signal, steps = self.signal[step], torch.full((len(obs),), step, device=obs.device)
            predicted = self.predict_noise(obs, actions, steps)
            clean = (actions - (1 - signal).sqrt() * predicted) / signal.sqrt()
            signal = self.signal[step - 1] if step else torch.ones_like(signal)
            actions = signal.sqrt() * clean.clamp(-1, 1) + (1 - signal).sqrt() * predicted
        return self.action_normalizer.invert(actions)


def make_policy() -> DiffusionPolicy:
    return DiffusionPolicy(Demonstrations(episodes=3, seed=1).limits)


def loaders() -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    train, unseen = Demonstrations(episodes=3, seed=1), Demonstrations(episodes=2, seed=3)
    return (
        DataLoader(train, batch_size=BATCH, sampler=EpochOrder(train), generator=torch.Generator()),
        DataLoader(unseen, batch_size=BATCH, generator=torch.Generator()),
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LambdaLR:
    def factor(update: int) -> float:
        if update < warmup:
            return update / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))

    return LambdaLR(optimizer, factor)


# Plain loop


class AveragedPolicy:
    """Moving average whose decay grows with the number of updates."""

    def __init__(self, policy: DiffusionPolicy, power: float = 0.75) -> None:
        self.policy = deepcopy(policy).eval().requires_grad_(False)
        self.power, self.updates = power, 0

    @torch.no_grad()
    def step(self, policy: nn.Module) -> None:
        decay = 1 - (1 + max(0, self.updates - 1)) ** -self.power
        for average, parameter in zip(self.policy.parameters(), policy.parameters(), strict=True):
            if decay == 0.0:
                average.copy_(parameter)
            else:
                average.lerp_(parameter, 1 - decay)
        self.updates += 1


@torch.no_grad()
def action_error(policy: DiffusionPolicy, batches: DataLoader[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        error = mse_loss(policy.predict_action(batch["obs"]), batch["action"])
        total += error.item() * len(batch["obs"])
        count += len(batch["obs"])
    return total / count


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    policy = make_policy()
    average = AveragedPolicy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=1e-6)
    train, unseen = loaders()
    scheduler = warmup_cosine(optimizer, WARMUP, EPOCHS * len(train))
    first_epoch, errors, checkpoint = 0, {}, folder / "latest.ckpt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        policy.load_state_dict(saved["policy"])
        average.policy.load_state_dict(saved["average"])
        average.updates = saved["updates"]
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first_epoch, errors = saved["epoch"] + 1, saved["errors"]
    for epoch in range(first_epoch, EPOCHS):
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # an EpochOrder
        losses = []
        for batch in train:
            loss = policy(batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            average.step(policy)
            losses.append(loss.item())
        done = (epoch + 1) * len(train)
        errors[done] = action_error(average.policy, unseen)
        record = {"epoch": epoch, "loss": sum(losses) / len(losses), "error": errors[done]}
        print(record)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        states = {
            "policy": policy.state_dict(),
            "average": average.policy.state_dict(),
            "updates": average.updates,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        torch.save({**states, "epoch": epoch, "errors": errors}, checkpoint)
        if errors[done] == min(errors.values()):
            torch.save(average.policy.state_dict(), folder / "best.ckpt")
    return {
        "model": policy.state_dict(),
        "average": average.policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr": scheduler.get_last_lr(),
        "metrics": errors,
    }


# With the trainer


class Denoising(SimpleBatchProcessor):
    def forward(self, model: DiffusionPolicy, batch: Batch) -> tuple[None, torch.Tensor]:
        return None, model(batch)

    def evaluation_forward(self, model: DiffusionPolicy, batch: Batch) -> tuple[Any, Any]:
        actions = model.predict_action(batch["obs"])
        return actions, {"action_error": mse_loss(actions, batch["action"])}


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=1e-6)
    train, unseen = loaders()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    best = run_folder / "best.safetensors"
    return HookBasedTrainer(
        Accelerator(cpu=True),
        policy,
        train,
        Denoising(),
        optimizer,
        warmup_cosine(optimizer, WARMUP, EPOCHS * len(train)),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch", sinks=[log]),
            EMAConfig(update_after_step=1),
            ValidationHookConfig(weights="EMA")(dataloaders={"val": unseen}),
            KeepBestConfig(monitor="eval/val/action_error", mode="min", path=best, weights="EMA"),
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    assert trainer.lr_scheduler is not None
    ema = trainer.hooks["EMA"]
    assert isinstance(ema, EMA)
    return {
        **trained_state(trainer),
        "average": ema.weights(),
        "lr": trainer.lr_scheduler.get_last_lr(),
        "metrics": logged(run_folder / "log.jsonl", "eval/val/action_error"),
    }
