"""Script of ``test_skipped_batches.py`` on each rank: batches that single ranks skip."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import MetricsLoggerConfig
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from tiny import loss_of, make_loader, make_model, weights

RUNS: dict[str, tuple[int, set[tuple[int, int]]]] = {
    "alone": (1, {(1, 0), (0, 2), (0, 4)}),  # accumulation, and (rank, step) of skipped batches
    "both in a step": (1, {(0, 1), (1, 1), (0, 3)}),
    "windows": (2, {(1, 0), (1, 1), (0, 2)}),
    "an entire window": (2, {(0, 2), (0, 3), (1, 2), (1, 3), (1, 4)}),
}
STEPS = 6
ZERO = "zero weights"
"""Run whose losses have the weight 0 in step 1, which rank 1 skips: the update is made."""
RUNS[ZERO] = (1, {(1, 1)})


class Skipper(PipelineHooks):
    def __init__(self, rank: int, skips: set[tuple[int, int]], allow: bool) -> None:
        super().__init__()
        self.rank, self.skips, self.has_computed = rank, skips, False
        self.step = 0
        self.on_loop.before(lambda args: args.allow_skip_batch() if allow else None)
        self.on_batch.before(self.skip)

    def skip(self, args: PipelineHookArgs) -> None:
        self.step = args.global_step_id
        if (self.rank, args.global_step_id) in self.skips:
            if self.has_computed:
                args.batch = None  # not to be computed with
            args.skip_batch("corrupt")
        else:
            self.has_computed = True


def train(
    accumulate: int,
    skips: set[tuple[int, int]],
    file: Path,
    allow: bool = True,
    weighted: bool = False,
    **options: Any,
) -> tuple[HookBasedTrainer, torch.nn.Module]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    logger = MetricsLoggerConfig(every="100 steps", sinks=[JsonLinesSinkConfig(path=str(file))])
    hook = Skipper(accelerator.process_index, skips, allow)

    def forward(module: Any, batch: Any) -> Any:
        return (
            (*loss_of(module, batch), float(hook.step != 1)) if weighted else loss_of(module, batch)
        )

    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_loader(2 * STEPS, 2),
        SimpleBatchProcessor.from_callable(forward),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[hook, logger],
        **options,
    )
    return trainer, model


def plain(accumulate: int, skips: set[tuple[int, int]]) -> tuple[list[torch.Tensor], int]:
    """Train a model on the other samples of all ranks in one loop."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, updates = list(make_loader(STEPS * 2, 2)), 0
    for begin in range(0, STEPS, accumulate):
        parts = [
            batches[2 * step + rank]
            for step in range(begin, min(STEPS, begin + accumulate))
            for rank in range(2)
            if (rank, step) not in skips
        ]
        if parts:
            optimizer.zero_grad()
            for part in parts:
                (loss_of(model, part)[1] / len(parts)).backward()
            optimizer.step()
            updates += 1
    return weights(model), updates


def logged(file: Path) -> float:
    """Return the number of skipped batches in the run's only record."""
    values = read_metrics(file)[-1].values
    return next(value.value for value in values if value.name == "skipped_batches")


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    rank = Accelerator(cpu=True).process_index
    if mode:
        train(1, {(1, 2)}, folder / "m", mode == "one" and rank == 0, max_epoch=1)[0]()
        return
    found = {}
    for name, (accumulate, skips) in RUNS.items():
        file = folder / f"{name}.jsonl"
        weighted = name == ZERO
        trainer, model = train(accumulate, skips, file, weighted=weighted, max_epoch=1)
        trainer()
        others = {*skips, (0, 1)} if weighted else skips
        expected, expected_updates = plain(accumulate, others)
        options: dict[str, Any] = {"weighted": weighted, "max_epoch": 1}
        first, _ = train(accumulate, skips, folder / "other", **options)
        first.hooks.on_step.after(
            lambda args: args.global_step_id == 2 and args.requests.stop("stopped")
        )
        first()
        first.save_checkpoint(folder / name)
        resumed, again = train(
            accumulate, skips, folder / "other", resume_from=folder / name, **options
        )
        resumed()
        found[name] = {
            "weights": weights(model),
            "expected": expected,
            "updates": trainer.progress.optimizer_step_id,
            "expected_updates": expected_updates + weighted,
            "skipped": trainer.progress.skipped_batches,
            "logged": 0 if rank else logged(file),
            "resumed": weights(again),
        }
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
