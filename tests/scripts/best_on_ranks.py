"""Script of each process in ``hooks/test_best_on_ranks.py``: keep the best step's weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ReduceLROnPlateau

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    EarlyStoppingConfig,
    KeepBestConfig,
    LossTrackerConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.testing import count_collectives
from tiny import loss_of, make_loader, make_model

NAME = "rollout/success"
VALUES = {4: 0.2, 8: 0.9, 12: float("inf"), 16: 0.5, 20: 0.4}
"""Published value by step, as the mean over the ranks; the best one is not at a logging point."""


def publish(args: PipelineHookArgs, reduce: str) -> None:
    """Publish the value of this step in a way that the ranks reduce to ``VALUES``."""
    accelerator = args.accelerator
    rank, count = accelerator.process_index, accelerator.num_processes
    value = VALUES[args.progress.steps_done]
    board = args.metrics
    if reduce == "mean":
        spread = 0.1 * (2 * rank - (count - 1))
        board.publish(NAME, torch.tensor(value + spread, device=accelerator.device))
    elif reduce == "rank 0":
        board.publish(NAME, 0.0 if rank else value, weight=0 if rank else 1)
    elif reduce == "last":
        board.publish(NAME, -1.0, "last")
        board.publish(NAME, torch.tensor(value + 5 * rank), "last")
    elif reduce == "sum":
        board.publish(NAME, value / count / 2, "sum")
        board.publish(NAME, torch.tensor(value / count / 2, dtype=torch.float64), "sum")
    elif reduce == "max":
        board.publish(NAME, value - rank, "max")
    elif rank == 0:
        board.publish(NAME, value)


def main(folder: Path, reduce: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = make_model()
    weights: dict[int, dict[str, torch.Tensor]] = {}
    records: list[list[object]] = []
    hooks = PipelineHooks("publishes")

    @hooks.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(
            lambda record: records.extend([v.name, v.step, v.value] for v in record.values)
        )

    @hooks.on_step.after(when="4 steps")
    def measure(args: PipelineHookArgs) -> None:
        publish(args, reduce)

    @hooks.on_step.after
    def keep(args: PipelineHookArgs) -> None:
        args.metrics.publish("unmonitored", 1.0, "sum")

    @hooks.on_optimizer_step.after
    def copy(args: PipelineHookArgs) -> None:
        inner = accelerator.unwrap_model(args.model)
        weights[args.progress.steps_done] = {n: t.clone() for n, t in inner.state_dict().items()}

    hooks.register_at_commit(lambda args: args.requests.log("it is time"), "10 steps")
    file, root = folder / "best.safetensors", folder / "checkpoints"
    keep_best = KeepBestConfig(monitor=NAME, mode="max", path=file)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_loader(40),
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0),
        lr_scheduler_monitor=NAME,
        hooks=[
            hooks,
            LossTrackerConfig(),
            SaveCheckpointConfig(
                folder=root, every=None, keep_last=1, keep_best=1, monitor=NAME, mode="max"
            ),
            keep_best,
            EarlyStoppingConfig(monitor=NAME, mode="max", patience=3),
        ],
        max_step=20,
    )
    with count_collectives() as calls:
        trainer()
    stop = trainer.requests.stop_request

    def step_of(path: Path) -> list[int]:
        kept = load_file(path)
        return [step for step, w in weights.items() if all(torch.equal(kept[n], w[n]) for n in w)]

    result = {
        "best": [keep_best.best_value, keep_best.best_step],
        "kept": step_of(file),
        "checkpoint": step_of(root / "best" / "model.safetensors"),
        "checkpoints": sorted(path.name for path in root.glob("step_*")),
        "stopped": [trainer.progress.global_step_id, stop and stop.reason],
        "lr": optimizer.param_groups[0]["lr"],
        "records": records,
        "gathers": sum("all_gather" in str(call) for call in calls),
    }
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
