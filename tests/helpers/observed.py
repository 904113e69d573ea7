"""A run on shuffled, augmented data with every hook that only observes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.regression import R2Score

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    ModelSummaryConfig,
    ProgressBarHookConfig,
    StatsMonitorConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig, TrackerSinkConfig
from tiny import loss_of


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Dataset with noise added while loading, and the index of each sample."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self._inputs = torch.randn(count, 4, generator=generator)
        self._targets = torch.randn(count, 2, generator=generator)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        noise = 0.1 * torch.randn(4)
        return self._inputs[index] + noise, self._targets[index], index


class Regression(SimpleBatchProcessor):
    def forward(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return loss_of(model, batch[:2])

    def metric_inputs(self, outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs, batch[1]


def make_metrics() -> MetricCollection:
    return MetricCollection({"mse": MeanSquaredError(), "r2": R2Score()})


def observing_hooks(folder: Path, log_every: str, evaluate_every: str) -> list[Any]:
    """Return every hook that only observes."""
    return [
        ProgressBarHookConfig(metrics=["train/mse", "eval/val/mse"]),
        MetricsLoggerConfig(
            every=log_every,
            sinks={
                "file": JsonLinesSinkConfig(path=str(folder / "metrics.jsonl")),
                "trackers": TrackerSinkConfig(trackers=["tensorboard"], folder=str(folder)),
                "log": LogSinkConfig(),
            },
        ),
        ModelSummaryConfig(),
        LossTrackerConfig(),
        StatsMonitorConfig(),
        MetricTrackerConfig()(metrics=make_metrics()),
        EMAConfig(decay=0.9),
        ValidationHookConfig(every=evaluate_every, at_start=True, weights="EMA")(
            dataloaders={"val": DataLoader(Augmented(21), batch_size=4, shuffle=True)},
            metrics=make_metrics(),
        ),
    ]


def make_observed_trainer(
    hooks: list[Any], max_step: int, seen: list[int] | None = None, buffers: bool = True
) -> HookBasedTrainer:
    """Build a trainer with dropout, momentum and BatchNorm; ``seen`` collects sample indices.

    With ``buffers=False`` there is no BatchNorm, whose buffers DDP broadcasts.
    """
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.BatchNorm1d(8) if buffers else torch.nn.Tanh(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 2),
    )
    recorder = PipelineHooks("recorder")
    if seen is not None:

        @recorder.on_step.before
        def record(args: PipelineHookArgs) -> None:
            seen.extend(args.batch[2].tolist())

    return HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        DataLoader(Augmented(48), batch_size=4, shuffle=True),
        Regression(),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        hooks=[*hooks, recorder],
        max_step=max_step,
    )
