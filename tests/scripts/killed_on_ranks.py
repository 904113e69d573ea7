"""Script of ``test_exact_ranks.py`` on each rank: a training that saves every step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from full_training import AugmentedSamples
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import EMAConfig, LossTrackerConfig, SaveCheckpointConfig
from robo_orchard_lab.testing.resume_worker import join_job
from robo_orchard_lab.testing.run_record import RunRecorder
from tiny import loss_of, make_model

STEPS = 8


def run(order: dict[str, Any]) -> None:
    """Run one start of one rank and record its steps."""
    join_job(order["rank"], order["ranks"], order["meeting"])
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5 + order["rank"])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = torch.nn.Sequential(
        Disordered(), make_model(), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.3)
    )
    trainer = HookBasedTrainer(
        accelerator,
        model,
        DataLoader(AugmentedSamples(), batch_size=3, shuffle=True, drop_last=True),
        SimpleBatchProcessor.from_callable(narrowed_loss),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        hooks=[
            LossTrackerConfig(),
            EMAConfig(decay=0.5),
            SaveCheckpointConfig(every="1 step", keep_last=2, in_background=order["in_background"]),
        ],
        max_step=STEPS,
        run_folder=order["folder"],
        resume_from="auto",
    )
    with RunRecorder(trainer, Path(order["record"]), order.get("stop_after")) as recorder:
        trainer()
        recorder.write_end()


class Disordered(torch.nn.Module):
    """Module with layers in another order than their use, and weights for two DDP buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(300, 4)
        self.first = torch.nn.Linear(4, 300)
        self.middle = torch.nn.Linear(300, 300)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(inputs))))
        return inputs + torch.tanh(self.last(hidden))


def narrowed_loss(model: torch.nn.Module, batch: Any) -> Any:
    inputs, targets = batch
    return loss_of(model, (inputs, targets.expand(-1, 2)))
