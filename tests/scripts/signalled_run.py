"""A run signalled at random instants and restarted until completed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks
from robo_orchard_lab.pipeline.hooks import (
    PreemptionConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.testing.resume_worker import join_job
from tiny import make_loader, make_model, make_trainer, weights


def make(folder: Path, ranks: int = 1, **options: Any) -> HookBasedTrainer:
    """Return a trainer with workers, evaluations, and background saves."""
    slow = PipelineHooks("slow")
    slow.on_step.before(lambda args: time.sleep(0.01))
    validation = ValidationHookConfig(every="7 steps")
    hooks: list[Any] = [
        SaveCheckpointConfig(every="3 steps", in_background=True),
        PreemptionConfig(),
        validation(dataloaders={"val": make_loader(4, num_workers=1)}),
        slow,
    ]
    return make_trainer(
        hooks,
        model=torch.nn.Sequential(make_model(), torch.nn.Dropout(0.5)),
        loader=make_loader(20 * ranks, shuffle=True, num_workers=2),
        accumulate=3,
        max_epoch=8,
        run_folder=folder,
        **options,
    )


def main(folder: Path, rank: int, ranks: int, meeting: str) -> None:
    join_job(rank, ranks, meeting)
    trainer = make(folder, ranks, resume_from="auto")
    print("made", flush=True)
    trainer()
    torch.save(weights(trainer.model), folder / f"weights{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
