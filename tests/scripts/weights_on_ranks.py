"""Trainings on two ranks with hooks that modify weights; also the script that the ranks run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from launching import launch
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.ema import EMA, EMAConfig
from robo_orchard_lab.pipeline.hooks.freeze import FreezeHookConfig
from robo_orchard_lab.pipeline.hooks.gradient_clipping import GradientClippingHookConfig
from tiny import loss_of, make_loader, make_model


def train_on(processes: int, folder: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    """Train with global batches of four and return the results of each rank."""
    folder.mkdir()
    launch(__file__, folder, 4 // processes, kind, processes=processes)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("rank*.pt"))]


def main(folder: Path, batch_size: int, kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    ema: EMA = EMAConfig(power=1.0, export_path=str(folder / "ema.safetensors"))()
    # Clipping precedes freezing: the norm must exclude frozen gradients.
    hooks: list[PipelineHooks] = [GradientClippingHookConfig(max_norm=0.5)()]
    if kind == "freeze":
        hooks.append(FreezeHookConfig(patterns=["0.*"], until_optimizer_step=5)())
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_loader(28 // batch_size, batch_size),
        SimpleBatchProcessor.from_callable(loss_of),
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        hooks=[*hooks, ema],
        max_epoch=2,
    )
    trainer()
    result = {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "ema": torch.cat([value.flatten() for value in ema.weights().values()]),
        "trainable": torch.tensor([p.requires_grad for p in model.parameters()]),
    }
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
