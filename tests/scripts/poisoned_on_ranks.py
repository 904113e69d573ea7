"""Script of each process in ``trainer/test_poisoned_runs.py``: a NaN on one of two ranks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    NonFiniteGuardConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteError
from robo_orchard_lab.pipeline.sharded_tensors import local_tensor
from tiny import loss_of, make_loader, make_model


class Processor(SimpleBatchProcessor):
    """Batch processor with a NaN loss at some calls of the second rank."""

    def __init__(self, rank: int, *calls: int) -> None:
        super().__init__()
        self.calls = set(calls) if rank == 1 else set()
        self.count = 0

    def forward(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += 1
        outputs, loss = loss_of(model, batch)
        return outputs, loss * (math.nan if self.count in self.calls else 1.0)


def hook_without_updates(step: int) -> PipelineHooks:
    """Return a hook that skips the update of a step."""
    hooks = PipelineHooks("without")

    @hooks.on_optimizer_step.before
    def skip(args: PipelineHookArgs) -> None:
        if args.global_step_id == step:
            args.skip_reason = "known"

    return hooks


def hook_with_poison(step: int, *ranks: int) -> PipelineHooks:
    """Return a hook that spoils the weights, or the shards of these ranks, after a step."""
    hooks = PipelineHooks("poison")

    @hooks.on_optimizer_step.after
    def spoil(args: PipelineHookArgs) -> None:
        if args.progress.steps_done == step and args.accelerator.process_index in ranks:
            local_tensor(next(args.model.parameters()).detach()).view(-1)[0] = math.nan

    return hooks


class Job:
    """Runs on this rank, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.root = root

    def trainer(
        self, name: str, hooks: list[Any], *calls: int, shard: bool = False, **options: Any
    ) -> HookBasedTrainer:
        model = make_model()
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (self.accelerator.num_processes,)))
        saver = SaveCheckpointConfig(every="2 steps", keep_last=None, in_background=True)
        return HookBasedTrainer(
            self.accelerator,
            model,
            make_loader(14, 2),
            Processor(self.accelerator.process_index, *calls),
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            hooks=[saver, LossTrackerConfig(), *hooks],
            max_epoch=1,
            run_folder=self.root / name,
            **options,
        )

    def run(self, name: str, hooks: list[Any], *calls: int) -> dict[str, Any]:
        trainer = self.trainer(name, hooks, *calls)
        trainer()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return {"weights": weights, "progress": trainer.progress.state_dict(), "skipped": {}}

    def saved(self, name: str) -> dict[int, list[str]]:
        infos = CheckpointStore(self.root / name / "checkpoints").list()
        return {info.step: list(info.non_finite or ())[:1] for info in infos}


def main(root: Path) -> None:
    job = Job(root)
    back = NonFiniteGuardConfig(then="rollback")
    late = NonFiniteGuardConfig(then="rollback", read="one update late")
    without = NonFiniteGuardConfig(then="rollback", skip_batch=True)
    found: dict[str, Any] = {
        "straight": job.run("straight", [back]),
        "glitch": job.run("glitch", [back], 6),
        "late": job.run("late", [late], 6),
        "skip_batch": job.run("skip_batch", [without], 6),
        "without": job.run("without", [hook_without_updates(5)]),
    }
    found["skip_batch"]["skipped"] = {"optimizer_step_id": 6, "skipped_optimizer_steps": 1}

    guard = NonFiniteGuardConfig(policy="skip")
    job.run("poisoned", [guard, hook_with_poison(6, 0, 1)], 3)
    resumed = job.trainer("poisoned", [guard, PipelineHooks("poison")], resume_from="auto")
    found["poisoned"] = {
        "saved": {step: names for step, names in job.saved("poisoned").items() if step < 7},
        "resumed_at": resumed.progress.global_step_id,
    }
    job.trainer("sharded", [hook_with_poison(4, 1)], shard=True)()
    found["sharded"] = job.saved("sharded")[2], job.saved("sharded")[4]
    try:
        once = NonFiniteGuardConfig(then="rollback", max_rollbacks=1)
        job.trainer("bound", [once], 6, 8)()
    except NonFiniteError as error:
        found["bound"] = str(error)
    torch.save(found, root / f"rank{job.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
