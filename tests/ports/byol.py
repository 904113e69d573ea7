"""BYOL: two views, a predictor, and a target network by moving average; as deepmind's byol."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from porting import RandomImages, State, trained_state
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, BATCH, IMAGES, BASE_DECAY = 4, 6, 24, 0.9
UPDATES = EPOCHS * IMAGES // BATCH


def augment(images: torch.Tensor) -> torch.Tensor:
    """Return randomly flipped, brightened and noisy images."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    brightness = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)
    return flipped * brightness + 0.05 * torch.randn_like(images)


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, outputs)
    )


class BYOL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.online = nn.Sequential(encoder, mlp(72, 16))
        self.predictor = mlp(16, 16)
        self.target = deepcopy(self.online).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the distance of each view's prediction from the target of the other."""
        first, second = augment(images), augment(images)
        with torch.no_grad():
            targets = self.target(first), self.target(second)
        predictions = self.predictor(self.online(second)), self.predictor(self.online(first))
        pairs = zip(predictions, targets, strict=True)
        distances = [2 - 2 * cosine_similarity(found, wanted) for found, wanted in pairs]
        return torch.stack(distances).sum(0).mean()

    def trained(self) -> list[nn.Parameter]:
        return [*self.online.parameters(), *self.predictor.parameters()]

    @torch.no_grad()
    def update_target(self, update: int) -> None:
        """Move the target towards the online network, less and less over the run."""
        decay = 1 - (1 - BASE_DECAY) * (math.cos(math.pi * update / UPDATES) + 1) / 2
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 1 - decay)


def make_loader() -> DataLoader[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return DataLoader(
        RandomImages(IMAGES), batch_size=BATCH, shuffle=True, drop_last=True, generator=generator
    )


# Plain loop


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    model = BYOL()
    optimizer = torch.optim.SGD(model.trained(), lr=0.05, momentum=0.9, weight_decay=1e-6)
    scheduler = CosineAnnealingLR(optimizer, UPDATES)
    loader = make_loader()
    first_epoch, update, checkpoint = 0, 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        loader.generator.set_state(saved["order"])
        torch.set_rng_state(saved["random"])
        first_epoch, update = saved["epoch"] + 1, saved["update"]
    for epoch in range(first_epoch, EPOCHS):
        losses = []
        for images in loader:
            loss = model(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            update += 1
            model.update_target(update)
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "order": loader.generator.get_state(),
                "random": torch.get_rng_state(),
                "epoch": epoch,
                "update": update,
            },
            checkpoint,
        )
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


# With the trainer


class TwoViews(SimpleBatchProcessor):
    def forward(self, model: BYOL, batch: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, model(batch)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    model = BYOL()
    optimizer = torch.optim.SGD(model.trained(), lr=0.05, momentum=0.9, weight_decay=1e-6)
    target = PipelineHooks("target")

    @target.on_optimizer_step.after
    def update_target(args: PipelineHookArgs) -> None:
        if args.update_committed:
            model.update_target(args.optimizer_step_id)

    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_loader(),
        TwoViews(),
        optimizer,
        CosineAnnealingLR(optimizer, UPDATES),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch", sinks=[log]),
            target,
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return trained_state(trainer)
