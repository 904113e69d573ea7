"""GPT with gradient accumulation and a hand-made LR rule, as nanoGPT trains it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler

from porting import State, logged, trained_state
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

UPDATES, ACCUMULATE, BATCH, CONTEXT = 12, 4, 4, 8
WARMUP, DECAY_END, LR, MIN_LR = 3, 10, 3e-3, 3e-4
TEXT = "a robot that learns to stack cups drops many cups before it stacks one. " * 8
VOCABULARY = sorted(set(TEXT))

Tokens = tuple[torch.Tensor, torch.Tensor]


class Windows(Dataset[Tokens]):
    """Windows of a text, with the next characters as targets."""

    def __init__(self, text: str) -> None:
        self.ids = torch.tensor([VOCABULARY.index(character) for character in text])

    def __len__(self) -> int:
        return len(self.ids) - CONTEXT

    def __getitem__(self, index: int) -> Tokens:
        window = self.ids[index : index + CONTEXT + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))  # type: ignore[no-any-return]  # an untyped call


class GPT(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, len(VOCABULARY), bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.tokens(ids) + self.positions(places)))  # type: ignore[no-any-return]  # an untyped call


def loaders() -> tuple[DataLoader[Tokens], DataLoader[Tokens]]:
    """Return random windows of the text's first part, and all windows of the rest."""
    generator = torch.Generator().manual_seed(1)
    text, unseen = Windows(TEXT[:480]), Windows(TEXT[480:])
    samples = UPDATES * ACCUMULATE * BATCH
    sampler = RandomSampler(text, replacement=True, num_samples=samples, generator=generator)
    train = DataLoader(text, batch_size=BATCH, sampler=sampler, generator=generator)
    return train, DataLoader(unseen, batch_size=16, generator=torch.Generator())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def learning_rate(update: int) -> float:
    """Return a linear warm-up, then half a cosine down to a constant."""
    if update < WARMUP:
        return LR * (update + 1) / (WARMUP + 1)
    progress = min((update - WARMUP) / (DECAY_END - WARMUP), 1.0)
    return MIN_LR + 0.5 * (1.0 + math.cos(math.pi * progress)) * (LR - MIN_LR)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Plain loop


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader[Tokens]) -> float:
    model.eval()
    total, count = 0.0, 0
    for ids, targets in batches:
        total += next_token_loss(model(ids), targets).item() * len(ids)
        count += len(ids)
    model.train()
    return total / count


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    model = GPT()
    optimizer = make_optimizer(model)
    train, unseen = loaders()
    update, values, checkpoint = 0, {}, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        update, values = saved["update"], saved["values"]
    batches = iter(train)
    while update < UPDATES:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update)
        loss_sum = 0.0
        for _ in range(ACCUMULATE):
            ids, targets = next(batches)
            loss = next_token_loss(model(ids), targets) / ACCUMULATE
            loss.backward()
            loss_sum += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update += 1
        if update % 2 == 0:
            print(f"update {update}: loss {loss_sum:.4f}")
        if update % 4 == 0:
            values[update * ACCUMULATE] = evaluate(model, unseen)
            print(f"update {update}: validation loss {values[update * ACCUMULATE]:.4f}")
            if values[update * ACCUMULATE] == min(values.values()):
                torch.save(model.state_dict(), folder / "best.pt")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "update": update,
                    "values": values,
                },
                checkpoint,
            )
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "metrics": values}


# With the trainer


class NextToken(SimpleBatchProcessor):
    def forward(self, model: nn.Module, batch: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        ids, targets = batch
        logits = model(ids)
        return logits, next_token_loss(logits, targets)


class LRRule(PipelineHooks):
    def __init__(self) -> None:
        super().__init__()
        self.on_optimizer_step.before(self.set_lr)

    def set_lr(self, args: PipelineHookArgs) -> None:
        assert args.optimizer is not None
        for group in args.optimizer.param_groups:
            group["lr"] = learning_rate(args.optimizer_step_id)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    model = GPT()
    train, unseen = loaders()
    metrics = JsonLinesSinkConfig(path=str(run_folder / "metrics.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE),
        model,
        train,
        NextToken(),
        make_optimizer(model),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="2 optimizer steps", sinks=[metrics]),
            GradientClippingHookConfig(max_norm=1.0),
            LRRule(),
            ValidationHookConfig(every="4 optimizer steps")(dataloaders={"val": unseen}),
            KeepBestConfig(
                monitor="eval/val/loss", mode="min", path=run_folder / "best.safetensors"
            ),
            SaveCheckpointConfig(every="4 optimizer steps"),
        ],
        max_optimizer_step=UPDATES,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return {
        **trained_state(trainer),
        "metrics": logged(run_folder / "metrics.jsonl", "eval/val/loss"),
    }
