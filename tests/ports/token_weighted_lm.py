"""Language model whose loss is the mean over the tokens of an accumulation window on all ranks.

Accelerate's example gradient_accumulation_for_autoregressive_models counts the tokens of a window
before its first forward pass. Both trainings here divide the gradients after the last backward
pass instead, which is equal up to rounding and needs no batch in advance.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset

from porting import State, logged, trained_state
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, ACCUMULATE, BATCH, LENGTH, VOCABULARY = 3, 2, 4, 10, 13
IGNORED = -100
MICRO_BATCHES = 5  # the last window of an epoch is shorter

Sequences = tuple[torch.Tensor, torch.Tensor]


class Sentences(Dataset[Sequences]):
    """Sequences of 3 to 10 tokens, padded, with the next tokens as labels."""

    def __init__(self, sentences: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, LENGTH + 1, (sentences, 1), generator=generator)
        starts = torch.randint(VOCABULARY, (sentences, 1), generator=generator)
        ids = (starts + torch.arange(LENGTH + 1) ** 2) % VOCABULARY
        is_padding = torch.arange(LENGTH) >= lengths
        self.ids = ids[:, :-1].masked_fill(is_padding, 0)
        self.labels = ids[:, 1:].masked_fill(is_padding, IGNORED)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sequences:
        return self.ids[index], self.labels[index]


class LanguageModel(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(VOCABULARY, width), nn.Dropout(0.1)
        self.rnn, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.rnn(self.dropout(self.embedding(ids)))
        return self.head(hidden)  # type: ignore[no-any-return]  # an untyped call


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of the tokens that are not padding, and their number."""
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return loss, (labels != IGNORED).sum()


def loaders(processes: int = 1) -> tuple[DataLoader[Sequences], DataLoader[Sequences]]:
    """Return loaders with the batches of one rank, or with those of several ranks together."""
    generator = torch.Generator().manual_seed(3)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    train = Sentences(MICRO_BATCHES * BATCH * ranks, seed=1)
    batch = BATCH * processes
    return (
        DataLoader(train, batch_size=batch, shuffle=True, generator=generator),
        DataLoader(Sentences(16, seed=2), batch_size=BATCH, generator=torch.Generator()),
    )


# Plain loop


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader[Sequences]) -> float:
    model.eval()
    total, count = 0.0, 0
    for ids, labels in batches:
        loss, tokens = token_loss(model(ids), labels)
        total += (loss * tokens).item()
        count += int(tokens)
    model.train()
    return total / count


def train_plainly(folder: Path) -> State:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = LanguageModel()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    no_sync = getattr(wrapped, "no_sync", nullcontext)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=9)
    train, unseen = loaders(ranks)
    first_epoch, values, checkpoint = 0, {}, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first_epoch, values = saved["epoch"] + 1, saved["values"]
    for epoch in range(first_epoch, EPOCHS):
        sums, window = torch.zeros(2), torch.zeros(())
        for index, batch in enumerate(train):
            ids, labels = (part.chunk(ranks)[rank] for part in batch)
            ends_window = (index + 1) % ACCUMULATE == 0 or index + 1 == len(train)
            with no_sync() if not ends_window else nullcontext():
                loss, tokens = token_loss(wrapped(ids), labels)
                (loss * tokens).backward()
            sums += torch.stack([loss.detach() * tokens, tokens])
            window += tokens
            if ends_window:
                if ranks > 1:
                    distributed.all_reduce(window)
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad *= ranks / window.item()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                window.zero_()
        if ranks > 1:
            distributed.all_reduce(sums)
        value = values[(epoch + 1) * len(train)] = evaluate(model, unseen)
        if rank == 0:
            print(f"epoch {epoch}: loss {sums[0] / sums[1]:.4f}, validation {value:.4f}")
            states = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save({**states, "epoch": epoch, "values": values}, checkpoint)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "metrics": values,
    }


# With the trainer


class TokenLoss(SimpleBatchProcessor):
    def forward(self, model: nn.Module, batch: Sequences) -> tuple[Any, torch.Tensor, torch.Tensor]:
        ids, labels = batch
        logits = model(ids)
        return logits, *token_loss(logits, labels)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train, unseen = loaders()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE),
        model,
        train,
        TokenLoss(),
        optimizer,
        LinearLR(optimizer, 1.0, 0.1, total_iters=9),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch", sinks=[log]),
            GradientClippingHookConfig(max_norm=1.0),
            ValidationHookConfig()(dataloaders={"val": unseen}),
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    return {
        **trained_state(trainer),
        "metrics": logged(run_folder / "log.jsonl", "eval/val/loss"),
    }
