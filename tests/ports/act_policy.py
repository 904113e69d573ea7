"""ACT: a transformer CVAE that predicts chunks of actions, as tonyzhaozh/act trains it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import l1_loss
from torch.utils.data import DataLoader, Dataset

from porting import State, logged, trained_state
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, BATCH, CHUNK, KL_WEIGHT = 4, 6, 5, 10.0
LR, BACKBONE_LR = 1e-3, 1e-4

Batch = dict[str, torch.Tensor]


class Episodes(Dataset[Batch]):
    """One random chunk of each episode: image, joint positions, and padded actions."""

    def __init__(self, episodes: int, seed: int, length: int = 9) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(episodes, 3, 12, 12, generator=generator)
        speed = self.images.mean(dim=(2, 3))[:, None] * 4
        self.joints = speed * torch.arange(length).view(1, -1, 1) + speed
        self.starts = torch.randint(length, (episodes,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        joints, start = self.joints[index], self.starts[index]
        following = joints[start : start + CHUNK]
        actions = torch.zeros(CHUNK, joints.shape[1])
        actions[: len(following)] = following
        is_padding = torch.arange(CHUNK) >= len(following)
        qpos = joints[start]
        return {
            "image": self.images[index],
            "qpos": qpos,
            "actions": actions,
            "is_padding": is_padding,
        }


class ACTPolicy(nn.Module):
    def __init__(self, joints: int = 3, width: int = 16, latent: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.qpos, self.action = nn.Linear(joints, width), nn.Linear(joints, width)
        self.latent, self.decoded_latent = nn.Linear(width, 2 * latent), nn.Linear(latent, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, batch_first=True)
        self.style_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.transformer = nn.Transformer(width, 2, 1, 1, 2 * width, 0.1, batch_first=True)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.queries = nn.Parameter(torch.randn(1, CHUNK, width))
        self.head = nn.Linear(width, joints)

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of the style of an action chunk."""
        token = self.class_token.expand(len(batch["qpos"]), -1, -1)
        tokens = [token, self.qpos(batch["qpos"])[:, None], self.action(batch["actions"])]
        is_padding = nn.functional.pad(batch["is_padding"], (2, 0))
        encoded = self.style_encoder(torch.cat(tokens, dim=1), src_key_padding_mask=is_padding)
        mean, log_variance = self.latent(encoded[:, 0]).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encode(batch)
        style = mean
        if self.training:
            style = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        image = self.backbone(batch["image"]).flatten(2).transpose(1, 2)
        tokens = [self.decoded_latent(style)[:, None], self.qpos(batch["qpos"])[:, None], image]
        queries = self.queries.expand(len(mean), -1, -1)
        return self.head(self.transformer(torch.cat(tokens, dim=1), queries)), mean, log_variance


def losses_of(policy: ACTPolicy, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the L1 loss of the actions that are not padding, and the KL divergence."""
    actions, mean, log_variance = policy(batch)
    error = l1_loss(actions, batch["actions"], reduction="none")
    l1 = (error * ~batch["is_padding"][..., None]).mean()
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
    return {"l1": l1, "kl": kl, "loss": l1 + KL_WEIGHT * kl}


def loaders() -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    generator = torch.Generator().manual_seed(5)
    train, unseen = Episodes(episodes=20, seed=1), Episodes(episodes=8, seed=2)
    return (
        DataLoader(train, batch_size=BATCH, shuffle=True, generator=generator),
        DataLoader(unseen, batch_size=BATCH, generator=torch.Generator()),
    )


def make_optimizer(policy: ACTPolicy) -> torch.optim.Optimizer:
    is_backbone = {name: name.startswith("backbone.") for name, _ in policy.named_parameters()}
    backbone = [p for name, p in policy.named_parameters() if is_backbone[name]]
    others = [p for name, p in policy.named_parameters() if not is_backbone[name]]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": backbone, "lr": BACKBONE_LR}]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=1e-4)


# Plain loop


def mean_by_name(sums: dict[str, float], count: int) -> dict[str, float]:
    return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def evaluate(policy: ACTPolicy, batches: DataLoader[Batch]) -> dict[str, float]:
    policy.eval()
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for batch in batches:
        for name, value in losses_of(policy, batch).items():
            sums[name] += value.item() * len(batch["qpos"])
        count += len(batch["qpos"])
    policy.train()
    return mean_by_name(sums, count)


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    policy = ACTPolicy()
    optimizer = make_optimizer(policy)
    train, unseen = loaders()
    first_epoch, validation, checkpoint = 0, {}, folder / "policy_last.ckpt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, validation = saved["epoch"] + 1, saved["validation"]
    for epoch in range(first_epoch, EPOCHS):
        sums: dict[str, float] = defaultdict(float)
        count = 0
        for batch in train:
            losses = losses_of(policy, batch)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] += value.item() * len(batch["qpos"])
            count += len(batch["qpos"])
        values, done = evaluate(policy, unseen), (epoch + 1) * len(train)
        print(f"epoch {epoch}: training {mean_by_name(sums, count)}, validation {values}")
        validation[done] = values
        if values["loss"] == min(each["loss"] for each in validation.values()):
            torch.save(policy.state_dict(), folder / "policy_best.ckpt")
        torch.save(
            {
                "policy": policy.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "validation": validation,
            },
            checkpoint,
        )
    return {
        "model": policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "l1": {"metrics": {step: values["l1"] for step, values in validation.items()}},
        "kl": {"metrics": {step: values["kl"] for step, values in validation.items()}},
    }


# With the trainer


class ActionChunks(SimpleBatchProcessor):
    def forward(self, model: ACTPolicy, batch: Batch) -> tuple[Any, torch.Tensor]:
        losses = losses_of(model, batch)
        return losses, losses["loss"]

    def evaluation_forward(self, model: ACTPolicy, batch: Batch) -> tuple[None, Any]:
        return None, losses_of(model, batch)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    policy = ACTPolicy()
    train, unseen = loaders()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    best = run_folder / "policy_best.safetensors"
    return HookBasedTrainer(
        Accelerator(cpu=True),
        policy,
        train,
        ActionChunks(),
        make_optimizer(policy),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(losses_key=""),
            MetricsLoggerConfig(every="1 epoch", sinks=[log]),
            ValidationHookConfig()(dataloaders={"val": unseen}),
            KeepBestConfig(monitor="eval/val/loss", mode="min", path=best),
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return {
        **trained_state(trainer),
        "l1": {"metrics": logged(run_folder / "log.jsonl", "eval/val/l1")},
        "kl": {"metrics": logged(run_folder / "log.jsonl", "eval/val/kl")},
    }
