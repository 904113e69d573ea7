"""Script of ``test_resume_processes.py`` on each rank: a training with stops."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import EMAConfig, LossTrackerConfig, SaveCheckpointConfig
from tiny import loss_of, make_model

STEPS = 8  # two epochs of four steps on each of two ranks


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from the RNGs of torch, NumPy and Python while loading."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(4) + np.random.rand() + random.random()
        return noise.float() + index / 10, torch.full((2,), float(index))


class Scaled(torch.nn.Module):
    """Module with a non-persistent buffer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Centred(torch.nn.Module):
    """Subtracts a running mean, so a forward pass depends on the buffers of its rank."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self.mean
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return centred


class Choosy(PipelineHooks):
    """Hook that refuses its saved state on one rank."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"any": "state"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.refuses:
            raise StateError("not this one")


def train(
    folder: Path, seed: int, stop_at: int | None, background: bool, refuses: bool = False
) -> dict[str, Any]:
    """Run one start of the training and return its results."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = torch.nn.Sequential(
        make_model(), Centred(), torch.nn.BatchNorm1d(2), Scaled(), torch.nn.Dropout(0.3), Centred()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[torch.Tensor] = []
    hooks = PipelineHooks()
    hooks.on_step.after(lambda args: losses.append(args.loss))
    if stop_at is not None:
        hooks.on_step.after(when=f"at steps {stop_at}")(lambda args: args.requests.stop("enough"))
    torch.manual_seed(seed + accelerator.process_index)
    np.random.seed(seed + accelerator.process_index)
    random.seed(seed + accelerator.process_index)
    trainer = HookBasedTrainer(
        accelerator,
        model,
        DataLoader(Augmented(), batch_size=4, shuffle=True),
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        hooks=[
            hooks,
            LossTrackerConfig(),
            EMAConfig(decay=0.5),
            Choosy(refuses and accelerator.process_index == 1),
            SaveCheckpointConfig(every="3 steps", in_background=background),
        ],
        max_step=STEPS,
        run_folder=folder,
        resume_from="auto",
    )
    trainer()
    return {
        "losses": losses,
        "weights": list(trainer.model.state_dict().values()),
        "random": [torch.rand(3), torch.tensor([np.random.rand(), random.random()])],
        "steps": trainer.progress.global_step_id,
        "open": psutil.Process().num_fds(),
    }


def main(folder: Path, stops: list[int], background: bool) -> None:
    found = [
        train(folder, seed, stop, background) for seed, stop in enumerate([*stops, None], start=5)
    ]
    refused = ""
    try:
        train(folder, 4, None, background, refuses=True)
    except StateError as error:
        refused = str(error)
    accelerator = Accelerator(cpu=True)
    result = {
        **found[-1],
        "losses": [loss for part in found for loss in part["losses"]],
        "open": [part["open"] for part in found],
        "refused": refused,
    }
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(stop) for stop in sys.argv[3:]], sys.argv[2] == "background")
