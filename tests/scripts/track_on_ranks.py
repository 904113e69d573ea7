"""Script of each process in ``hooks/test_tracking_on_ranks.py``: train and save the records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks.early_stopping import EarlyStoppingConfig
from robo_orchard_lab.pipeline.hooks.keep_best import KeepBestConfig
from robo_orchard_lab.pipeline.hooks.loss_tracker import LossTrackerConfig
from robo_orchard_lab.pipeline.hooks.stats_monitor import StatsMonitorConfig
from robo_orchard_lab.testing import count_collectives
from tiny import make_model, without_checks


class Losses(SimpleBatchProcessor):
    """Batch processor with batches as losses; a batch of rank 1 counts three samples."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        loss = model(torch.ones(1, 4)).sum() * 0 + batch
        return ({"own": loss} if self.rank else {}), loss

    def count_samples(self, batch: Any) -> int:
        return 1 + 2 * self.rank


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    model = make_model()
    records: list[list[Any]] = []
    requested_by: list[str] = []
    hooks = PipelineHooks("listens")

    @hooks.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(lambda r: records.append([[v.name, v.step, v.value] for v in r.values]))
        args.requests.listen(lambda request: requested_by.append(request.by))

    hooks.register_at_commit(lambda args: args.requests.log("it is time"), "2 steps")
    file = folder / "best.safetensors"
    keep = KeepBestConfig(monitor="loss/total", mode="min", path=file)()
    if len(sys.argv) > 2:  # as if resumed: the file of the first rank counts

        @hooks.on_loop.before
        def use_another_path(args: PipelineHookArgs) -> None:
            keep.cfg.path = file if rank == 0 else folder / "unseen.safetensors"

        keep.load_state_dict({"version": 1, "best": {"value": 11.0, "step": 1, "since": 0}})
    trainer = HookBasedTrainer(
        accelerator,
        model,
        [torch.tensor(float(loss + 10 * rank)) for loss in (8, 6, 4, 2, 4, 6, 8, 6)],
        Losses(rank),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[
            StatsMonitorConfig(),
            hooks,
            LossTrackerConfig(losses_key=""),
            EarlyStoppingConfig(monitor="loss/total", mode="min", patience=2),
            keep,
        ],
        max_epoch=2,
    )
    with count_collectives() as calls:
        trainer()
    request = trainer.requests.stop_request
    metadata: dict[str, str] = {}
    if rank == 0:
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata()
    result = {
        "records": records,
        "steps": trainer.progress.global_step_id,
        "reason": request and request.reason,
        "best": [keep.best_value, keep.best_step],
        "metadata": metadata,
        "collectives": len(without_checks(calls))
        - 1,  # without the comparison of hooks at the start
        "saves": requested_by.count("KeepBest"),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
