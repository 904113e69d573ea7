"""Script of ``test_auto_steps.py`` on each rank: trainings with predicted LR scheduler steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from launching import end_group
from robo_orchard_lab.experiment.run_plan import count_lr_scheduler_steps
from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor, TrainerLimits
from tiny import make_loader, make_model


def seven_and_five() -> Any:
    """Return different numbers of batches on the two ranks."""
    return list(make_loader(7 - 2 * PartialState().process_index))


LOADERS: dict[str, Any] = {
    "divided": lambda: make_loader(7, rest=3),
    "divided, the rest dropped": lambda: make_loader(7, rest=3, drop_last=True),
    "each its own": seven_and_five,
}
LIMITS: list[dict[str, Any]] = [
    {"max_epoch": 2},
    {"max_step": 6, "max_epoch": 2},
    {"max_optimizer_step": 3},
]


def main(folder: Path) -> None:
    found = {}
    for accumulate in (1, 2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        for name, make in LOADERS.items():
            for limits in LIMITS:
                loader, model = make(), make_model()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
                counted = count_lr_scheduler_steps(loader, accelerator, TrainerLimits(**limits))
                HookBasedTrainer(
                    accelerator,
                    model,
                    loader,
                    SupervisedProcessor(torch.nn.MSELoss()),
                    optimizer,
                    lr_scheduler,
                    **limits,
                )()
                found[f"{name}, {limits}, {accumulate}"] = counted, lr_scheduler.last_epoch
    rank = PartialState().process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
