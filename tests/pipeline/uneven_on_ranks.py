"""What each process of ``test_uneven_data.py`` runs: trainings on uneven data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
)
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from tiny import loss_of, make_loader, make_model

Optimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class TwoAtATime(Sampler[list[int]]):
    """A batch sampler of one's own: batches of two, the last of which may be of one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter([list(range(n, min(n + 2, self.count))) for n in range(0, self.count, 2)])


@dataclass
class Training:
    """One that is compared with itself on another number of processes."""

    samples: int
    batch_size: int = 6
    """Of the whole job."""
    accumulate: int = 1
    optimizer: str = "sgd"
    make_loader: Callable[[Any, int], Any] = lambda dataset, batch_size: DataLoader(
        dataset, batch_size, shuffle=True
    )
    processor: Callable[[], Any] = lambda: SimpleBatchProcessor.from_callable(loss_of)


TRAININGS = {
    "even": Training(24),
    # Seven batches, the last of which has two samples: one rank of three has none of them.
    "short last batch": Training(38, accumulate=3),
    "short last batch, adamw": Training(38, accumulate=3, optimizer="adamw"),
    "one step of two": Training(37, accumulate=1, optimizer="adamw"),
    "fewer samples than ranks": Training(1),
    "drop_last": Training(
        28, make_loader=lambda data, size: DataLoader(data, size, drop_last=True)
    ),
}


def train(training: Training, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """What came of it on this rank."""
    torch.manual_seed(3)  # the seed of the order
    loader = make_loader(1, training.samples)
    model = make_model()
    optimizer = OPTIMIZERS[training.optimizer](model.parameters())
    steps: list[dict[str, Any]] = []

    def note(args: PipelineHookArgs) -> None:
        numbers = args.sample_numbers
        steps.append(
            {
                "numbers": None if numbers is None else list(numbers),
                "indices": args.sample_indices,
                "filler": args.is_filler,
                "size": args.batch_size,
            }
        )

    losses: list[Any] = []
    hooks = PipelineHooks("notes")
    hooks.register_hook("on_step", HookContext.from_callable(after=note))
    hooks.register_hook(
        "on_loop",
        HookContext.from_callable(
            before=lambda args: args.metrics.listen(lambda record: losses.append(record))
        ),
    )
    accelerator.gradient_accumulation_steps = training.accumulate
    trainer = HookBasedTrainer(
        accelerator,
        model,
        training.make_loader(loader.dataset, training.batch_size // accelerator.num_processes),
        training.processor(),
        optimizer,
        hooks=[
            hooks,
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch"),
            GradientClippingHookConfig(max_norm=0.5),
        ],
        max_epoch=2,
        run_folder=folder / "run",
    )
    trainer()
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "steps": steps,
        "losses": {
            value.name: value.value
            for value in losses[-1].values
            if value.name.startswith(("loss", "grad"))
        },
        "progress": trainer.progress.state_dict(),
    }


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True)
    results = {
        name: [train(training, accelerator, folder) for _ in range(2)]
        for name, training in TRAININGS.items()
    }
    torch.save(results, folder / f"rank{accelerator.process_index}.pt")
    accelerator.end_training()  # a process group that is left open aborts the process at its exit
    if accelerator.num_processes > 1:
        time.sleep(1)  # gloo aborts a process that exits within half a second of its first exchange


if __name__ == "__main__":
    main(Path(sys.argv[1]))
