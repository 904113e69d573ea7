"""Script of each process in ``hooks/test_non_finite_guard.py``: train with one bad rank."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHookArgs
from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteError, NonFiniteGuardConfig
from robo_orchard_lab.testing import count_collectives
from tiny import loss_of, make_loader, make_model, without_checks

BAD_STEP = 3


class Processor(SimpleBatchProcessor):
    """Batch processor with an infinite loss and finite gradients in one step of one rank."""

    def __init__(self, bad_rank: int | None, rank: int) -> None:
        super().__init__()
        self.is_bad = bad_rank == rank
        self.step = -1

    def forward(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.step += 1
        outputs, loss = loss_of(model, batch)
        return outputs, loss + math.inf if self.is_bad and self.step == BAD_STEP else loss


def skip_the_bad_step(accumulate: int) -> PipelineHooks:
    """Return a user's hook that skips a known window."""

    def skip(args: PipelineHookArgs) -> None:
        if args.global_step_id // accumulate == BAD_STEP // accumulate:
            args.skip_reason = "known"

    hooks = PipelineHooks("skipping")
    hooks.register_hook("on_optimizer_step", HookContext.from_callable(before=skip))
    return hooks


def train(accelerator: Accelerator, hooks: Any, bad_rank: int | None) -> dict[str, Any]:
    """Train; return the weights, the buffers, the counters and the error's text."""
    model = torch.nn.Sequential(make_model(), torch.nn.BatchNorm1d(2))
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_loader(14, 2),
        Processor(bad_rank, accelerator.process_index),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        hooks=hooks,
        max_epoch=1,
    )
    error = ""
    try:
        trainer()
    except NonFiniteError as raised:
        error = str(raised)
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "progress": trainer.progress.state_dict(),
        "error": error,
    }


def main(folder: Path, accumulate: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    guard = NonFiniteGuardConfig(policy="skip", quarantine=folder / "quarantine")
    late = NonFiniteGuardConfig(read="one update late")
    logged = NonFiniteGuardConfig(read="at logging points")
    known = skip_the_bad_step(accumulate)
    train(accelerator, [], None)  # a first run makes one-time collectives
    with count_collectives() as calls:
        result: dict[str, Any] = {
            "finite": train(accelerator, [], None),
            "finite_guarded": train(accelerator, [guard], None),
            "known": train(accelerator, [known], None),
            "guarded": train(accelerator, [guard], 1),
            "late": train(accelerator, [late], 1),
            "at_the_end": train(accelerator, [logged], 1),
            "raised": train(accelerator, [NonFiniteGuardConfig()], 1),
        }
    result["calls"] = [call.what for call in without_checks(calls)]
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
