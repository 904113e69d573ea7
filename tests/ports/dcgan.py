"""DCGAN: two optimizers in turn, the generator's after the discriminator's; as pytorch/examples.

In bf16 the discriminator's two errors have one backward pass: two passes would round twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import binary_cross_entropy
from torch.optim import Adam
from torch.utils.data import DataLoader

from plain_ranks import autocast, average_gradients, rank_and_world_size, share_buffers
from porting import EpochOrder, RandomImages, State, trained_state
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, BATCH, IMAGES, NOISE = 3, 6, 36, 5


class GAN(nn.ModuleDict):
    """Generator ``g`` from noise to images, and discriminator ``d``."""

    def __init__(self) -> None:
        super().__init__()
        self["g"] = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 8, 4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self["d"] = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 1, 4, bias=False),
            nn.Sigmoid(),
            nn.Flatten(0),
        )
        for name, weight in self.named_parameters():
            if weight.dim() == 4:
                nn.init.normal_(weight, 0.0, 0.02)
            elif name.endswith("weight"):
                nn.init.normal_(weight, 1.0, 0.02)


def error(judged: torch.Tensor, label: float) -> torch.Tensor:
    return binary_cross_entropy(judged, torch.full_like(judged, label))


# Plain loop


def train_plainly(folder: Path, precision: str = "no") -> State:
    torch.manual_seed(0)
    rank, world_size = rank_and_world_size()
    images = RandomImages(IMAGES, low=-1.0)
    sampler = EpochOrder(images)
    # With a generator of its own, the loader draws nothing from the global RNG
    loader = DataLoader(images, BATCH * world_size, sampler=sampler, generator=torch.Generator())
    model = GAN()
    g, d = model["g"], model["d"]
    optimizer_d = Adam(d.parameters(), lr=0.002, betas=(0.5, 0.999))
    optimizer_g = Adam(g.parameters(), lr=0.002, betas=(0.5, 0.999))
    first_epoch, checkpoint = 0, folder / f"checkpoint{rank}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer_d.load_state_dict(saved["optimizer_d"])
        optimizer_g.load_state_dict(saved["optimizer_g"])
        torch.set_rng_state(saved["random"])
        first_epoch = saved["epoch"] + 1
    for epoch in range(first_epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for step, batch in enumerate(loader):
            share_buffers(model)
            real = batch.chunk(world_size)[rank]
            # Update the discriminator
            with autocast(precision):
                real_error = error(d(real), 1.0)
                fake = g(torch.randn(len(real), NOISE, 1, 1))
                fake_error = error(d(fake.detach()), 0.0)
            d.zero_grad()
            if precision == "no":
                real_error.backward()
                fake_error.backward()
            else:
                (real_error + fake_error).backward()
            average_gradients(d.parameters())
            optimizer_d.step()
            # Update the generator
            with autocast(precision):
                g_error = error(d(fake), 1.0)
            g.zero_grad()
            g_error.backward()
            average_gradients(g.parameters())
            optimizer_g.step()
            if step % 3 == 0:
                d_error = real_error.item() + fake_error.item()
                print(f"[{epoch}/{EPOCHS}][{step}/{len(loader)}] {d_error:.4f} {g_error:.4f}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer_d": optimizer_d.state_dict(),
                "optimizer_g": optimizer_g.state_dict(),
                "random": torch.get_rng_state(),
                "epoch": epoch,
            },
            checkpoint,
        )
    return {
        "model": model.state_dict(),
        "optimizers": {"d": optimizer_d.state_dict(), "g": optimizer_g.state_dict()},
    }


# With the trainer


class Adversaries(SimpleBatchProcessor):
    def forward(self, model: GAN, batch: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        g, d = model["g"], model["d"]
        real_error = error(d(batch), 1.0)
        fake = g(torch.randn(len(batch), NOISE, 1, 1))
        yield "d", real_error + error(d(fake.detach()), 0.0)
        yield "g", error(d(fake), 1.0)


def build(run_folder: Path, resume_from: Any = None, precision: str = "no") -> HookBasedTrainer:
    torch.manual_seed(0)
    images = RandomImages(IMAGES, low=-1.0)
    model = GAN()
    optimizers = {
        name: Adam(model[name].parameters(), lr=0.002, betas=(0.5, 0.999)) for name in ("d", "g")
    }
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True, mixed_precision=precision),
        model,
        DataLoader(images, BATCH, sampler=EpochOrder(images)),
        Adversaries(),
        optimizers,
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="3 steps", sinks=[log]),
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return trained_state(trainer)
