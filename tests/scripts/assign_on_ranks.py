"""Training on ranks with a hook that assigns batch and loss, or a read-only field on one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from tiny import loss_of, make_loader, make_model, weights


def assigning() -> PipelineHooks:
    """Hook that doubles the inputs and triples the loss."""
    hooks = PipelineHooks("assigning")

    @hooks.on_batch.before
    def assign_batch(args: PipelineHookArgs) -> None:
        args.batch = (args.batch[0] * 2, args.batch[1])

    @hooks.on_model_backward.before
    def assign_loss(args: PipelineHookArgs) -> None:
        assert args.attached_loss is not None
        args.attached_loss = args.attached_loss * 3

    return hooks


def main(folder: Path, kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    hooks = assigning()

    @hooks.on_step.before
    def steer(args: PipelineHookArgs) -> None:
        if kind == "steers" and accelerator.process_index == 1:
            args.at_accumulation_boundary = True  # type: ignore[misc]  # what is tested

    model = make_model()
    HookBasedTrainer(
        accelerator,
        model,
        make_loader(6, batch_size=2),
        SimpleBatchProcessor.from_callable(loss_of),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=hooks,
        max_epoch=1,
    )()
    torch.save(weights(model), folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
