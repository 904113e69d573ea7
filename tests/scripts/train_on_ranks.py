"""Script of ``test_processes.py`` on each rank: train and save the results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.testing import count_collectives
from tiny import loss_of, make_loader, make_model, without_checks


def main(folder: Path, accumulate: int, batch_size: int, schedule: str) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler: LRScheduler = StepLR(optimizer, step_size=1, gamma=0.9)
    if schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.05)
    gradients: list[torch.Tensor] = []
    hooks = PipelineHooks()
    hooks.register_hook(
        "on_step",
        HookContext.from_callable(
            after=lambda args: gradients.append(next(args.model.parameters()).grad.clone())  # type: ignore[union-attr]  # there is one
        ),
    )
    loader: Any = make_loader(28 // batch_size, batch_size)
    trainer = HookBasedTrainer(
        accelerator,
        model,
        list(loader) if schedule == "list" else loader,
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        scheduler,
        [hooks],
        max_epoch=8 if schedule == "plateau" else 2,
    )
    with count_collectives() as calls:
        trainer()
    result = {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "gradients": torch.stack(gradients),
        "rate": torch.tensor(optimizer.param_groups[0]["lr"]),
        "moves": torch.tensor(scheduler.last_epoch),
        "updates": torch.tensor(trainer.progress.optimizer_step_id),
        "collectives": torch.tensor(len(without_checks(calls))),
    }
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
