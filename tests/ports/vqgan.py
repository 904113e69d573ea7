"""VQ-GAN: adaptive weight of the adversarial loss, late discriminator; as taming-transformers.

Each update accumulates two micro-batches. Until its start, the discriminator makes no update; the
original then makes updates with zeros as gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss, relu
from torch.optim import Adam
from torch.utils.data import DataLoader

from plain_ranks import autocast, average_gradients, rank_and_world_size, share_buffers
from porting import EpochOrder, RandomImages, State, trained_state
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

STEPS, ACCUMULATE, BATCH, IMAGES, DISCRIMINATOR_START = 20, 2, 4, 160, 6


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder; returns reconstructions and the codebook's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))
        self.codes = nn.Embedding(16, 4)
        nn.init.uniform_(self.codes.weight, -1 / 16, 1 / 16)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.SiLU())
        self.last_layer = nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.encoder(images).movedim(1, -1).float()
        nearest = torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(1)
        codes = self.codes(nearest).view_as(z)
        codebook_loss = mse_loss(codes.detach(), z) + 0.25 * mse_loss(codes, z.detach())
        straight_through = z + (codes - z).detach()
        return self.last_layer(self.decoder(straight_through.movedim(-1, 1))), codebook_loss


class VQGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder()
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 2)
        )
        features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.perception = features.requires_grad_(False)  # for LPIPS

    def autoencoder_loss(self, images: torch.Tensor, is_adversarial: bool) -> torch.Tensor:
        reconstructions, codebook_loss = self.autoencoder(images)
        perceived = mse_loss(self.perception(reconstructions), self.perception(images))
        loss = (reconstructions - images).abs().mean() + perceived
        if not is_adversarial:
            return loss + codebook_loss  # type: ignore[no-any-return]  # an untyped call
        deception = -self.discriminator(reconstructions).mean()
        weight = self.autoencoder.last_layer.weight
        norms = [
            torch.autograd.grad(part, weight, retain_graph=True)[0].norm()
            for part in (loss, deception)
        ]
        adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
        return loss + adaptive * 0.8 * deception + codebook_loss  # type: ignore[no-any-return]  # an untyped call

    def discriminator_loss(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reconstructions, _ = self.autoencoder(images)
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        return 0.5 * (relu(1.0 - real).mean() + relu(1.0 + fake).mean())


def make_loader(batch_size: int) -> DataLoader[torch.Tensor]:
    images = RandomImages(IMAGES)
    return DataLoader(images, batch_size, sampler=EpochOrder(images), generator=torch.Generator())


# Plain loop


def train_plainly(folder: Path, precision: str = "no") -> State:
    torch.manual_seed(0)
    rank, world_size = rank_and_world_size()
    loader = make_loader(BATCH * world_size)
    model = VQGAN()
    autoencoder, discriminator = model.autoencoder, model.discriminator
    optimizers = [
        Adam(each.parameters(), lr=2e-3, betas=(0.5, 0.9)) for each in (autoencoder, discriminator)
    ]
    first_step, checkpoint = 0, folder / f"checkpoint{rank}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = saved["step"]
    for step, batch in enumerate(loader):
        if step < first_step:
            continue
        if step == STEPS:
            break
        share_buffers(model)
        batch = batch.chunk(world_size)[rank]
        is_adversarial = step >= DISCRIMINATOR_START
        is_boundary = (step + 1) % ACCUMULATE == 0
        with autocast(precision):
            loss = model.autoencoder_loss(batch, is_adversarial)
        (loss / ACCUMULATE).backward(inputs=[*autoencoder.parameters()])
        if is_boundary:
            average_gradients(autoencoder.parameters())
            optimizers[0].step()
            optimizers[0].zero_grad()
        if is_adversarial:
            with autocast(precision):
                d_loss = model.discriminator_loss(batch)
            (d_loss / ACCUMULATE).backward()
            if is_boundary:
                average_gradients(discriminator.parameters())
                optimizers[1].step()
                optimizers[1].zero_grad()
        if is_boundary:
            print(f"step {step + 1} of {STEPS}: {loss.item():.4f}")
            if is_adversarial:
                print(f"discriminator: {d_loss.item():.4f}")
        if (step + 1) % 10 == 0:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                },
                checkpoint,
            )
    states = [optimizer.state_dict() for optimizer in optimizers]
    names = ("autoencoder", "discriminator")
    return {"model": model.state_dict(), "optimizers": dict(zip(names, states, strict=True))}


# With the trainer


class VQGANLosses(SimpleBatchProcessor):
    is_adversarial = False

    def forward(self, model: VQGAN, batch: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield "autoencoder", model.autoencoder_loss(batch, self.is_adversarial)
        if self.is_adversarial:
            yield "discriminator", model.discriminator_loss(batch)


class LateDiscriminator(PipelineHooks):
    def __init__(self) -> None:
        super().__init__()
        self.on_batch.before(self.start)

    def start(self, args: PipelineHookArgs) -> None:
        losses = args.run.batch_processor
        assert isinstance(losses, VQGANLosses)
        losses.is_adversarial = args.global_step_id >= DISCRIMINATOR_START


def build(run_folder: Path, resume_from: Any = None, precision: str = "no") -> HookBasedTrainer:
    torch.manual_seed(0)
    model = VQGAN()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATE),
        model,
        make_loader(BATCH),
        VQGANLosses(),
        {
            name: Adam(getattr(model, name).parameters(), lr=2e-3, betas=(0.5, 0.9))
            for name in ("autoencoder", "discriminator")
        },
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="2 steps", sinks=[log]),
            LateDiscriminator(),
            SaveCheckpointConfig(every="10 steps"),
        ],
        max_step=STEPS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return trained_state(trainer)
