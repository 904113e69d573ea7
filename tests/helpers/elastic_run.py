"""Script of each rank in ``test_world_size_change.py``: a part of a training at any world size.

A global step has six samples, so samples, updates and logs equal one process's.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanSquaredError, PearsonCorrCoef

from full_training import AugmentedSamples, NamedLosses
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

SAMPLES_PER_STEP = 6
SAMPLES = AugmentedSamples(dtype=torch.float64)
EPOCHS = 2


class CountedLosses(NamedLosses):
    """Batch processor that counts its samples, so windows are loaded in advance."""

    def count_samples(self, batch: Any) -> int:
        return len(batch[0])


class Counted(PipelineHooks):
    """Hook with a per-rank count of samples, which redistribution sums on rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0
        self.on_step.after(self.count)

    def count(self, args: PipelineHookArgs) -> None:
        self.samples += args.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples = state["samples"]

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        total = sum(state["samples"] for state in states)
        if total == 0:
            raise StateError("there is nothing to share")
        return [{"samples": total if rank == 0 else 0} for rank in range(processes)]


class Numbered(PipelineHooks):
    """Hook with a per-rank state without redistribution."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.begun_as = rank

    def state_dict(self) -> dict[str, Any]:
        return {"begun_as": self.begun_as}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begun_as = state["begun_as"]


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """All samples in order, on every rank."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return map(SAMPLES.__getitem__, range(len(SAMPLES)))


class Watcher(PipelineHooks):
    """Records all events, the samples of each step and random numbers of this rank; may stop."""

    def __init__(self, path: Path, stop_after: int | None) -> None:
        super().__init__()
        self._file = path.open("w")
        self._stop_after = stop_after
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._recording(channel))
        self.on_step.after(self.end_step)

    def _recording(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def record(role: str, args: PipelineHookArgs) -> None:
            counters = [args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id]
            self.write("event", args.global_step_id, [role, channel, *counters, args.evaluation])

        return HookContext.from_callable(
            lambda args: record("before", args), lambda args: record("after", args)
        )

    def end_step(self, args: PipelineHookArgs) -> None:
        inputs, _ = args.batch
        rows = [row.numpy().tobytes().hex() for row in inputs]
        samples = [[*pair] for pair in zip(args.sample_indices or [], rows, strict=False)]
        self.write("samples", args.global_step_id, samples)
        self.write("drawn", args.global_step_id, [random.getrandbits(32), np.random.rand()])
        if args.global_step_id + 1 == self._stop_after:
            args.requests.stop("enough for today")

    def write(self, *line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def build(order: dict[str, Any]) -> HookBasedTrainer:
    """Build a training with losses, metrics, averaged evaluations and an LR scheduler."""
    folder, ranks = Path(order["folder"]), order["ranks"]
    torch.manual_seed(3)  # of the weights
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).double()
    if order.get("sharded"):
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (model[0], model[3], model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    lr_scheduler: LRScheduler = (
        ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        if order.get("plateau")
        else OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    )
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(order.get("seed", 5) * 100 + order["rank"])
    generator = torch.Generator().manual_seed(5)
    unseen = (torch.randn(n, d, generator=generator).double() for n, d in ((7, 4), (7, 1)))
    streams = order.get("streams", False)
    data: Any = Stream() if streams else SAMPLES
    loader = DataLoader(
        data,
        batch_size=order.get("batch_size", SAMPLES_PER_STEP // ranks),
        shuffle=None if streams else True,
        num_workers=order.get("workers", 0),
    )
    correlation = MetricTrackerConfig()(metrics={"correlation": PearsonCorrCoef()})
    correlation.name = "correlation"
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=order.get("accumulate", 3)),
        model,
        loader,
        CountedLosses() if order.get("counted") else NamedLosses(),
        optimizer,
        lr_scheduler,
        [
            MetricsLoggerConfig(
                every="3 steps | 1 epoch",
                sinks=[JsonLinesSinkConfig(path=str(folder / "metrics.jsonl"))],
            ),
            GradientClippingHookConfig(max_norm=0.5),
            LossTrackerConfig(losses_key="losses"),
            MetricTrackerConfig()(metrics={"error": MeanSquaredError()}),
            *([correlation] if order.get("unjoinable") else []),
            EMAConfig(power=0.75),
            ValidationHookConfig(every="2 steps | 1 epoch", weights="EMA")(
                dataloaders={"val": DataLoader(TensorDataset(*unseen), batch_size=2)},
                metrics={"error": MeanSquaredError()},
            ),
            SaveCheckpointConfig(every="1 step | 1 epoch", keep_last=None),
            Counted(),
            Numbered(order["rank"]),
            Watcher(folder / f"{order['name']}-{order['rank']}.jsonl", order.get("stop_after")),
        ],
        max_epoch=EPOCHS,
        run_folder=folder,
        resume_from=order.get("resume_from", "auto"),
        data_order=DataOrder(
            keyed_by=order.get("keyed_by", "sample"),
            allow_other_batch_size=order.get("allow", False),
        ),
    )


def run(order: dict[str, Any]) -> None:
    """Run one start of one rank and save the results to the folder."""
    rank, ranks = order["rank"], order["ranks"]
    torch.set_num_threads(1)
    if ranks > 1 or order.get("sharded"):
        of_job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in of_job.items()})
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{order['meeting']}", rank=rank, world_size=ranks
        )
    trainer = build(order)
    trainer()
    hooks = {hook.name: hook for hook in trainer.hooks.all_hooks()}
    torch.save(
        {
            "weights": gather_full_tensors(
                trainer.accelerator.unwrap_model(trainer.model).state_dict(), keep=True
            ),
            "progress": trainer.progress.state_dict(),
            "hooks": {name: hooks[name].state_dict() for name in ("Counted", "Numbered")},
        },
        Path(order["folder"]) / f"{order['name']}-{rank}.pt",
    )
