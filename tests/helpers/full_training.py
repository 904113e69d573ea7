"""A CPU training with every stateful component, for tests that stop anywhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics import MeanSquaredError, PearsonCorrCoef

from dies_at_a_call import DieAt
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.hooks import (
    ClearCacheHookConfig,
    EarlyStoppingConfig,
    EMAConfig,
    FreezeHookConfig,
    GradientClippingHookConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    ModelSummaryConfig,
    NonFiniteGuardConfig,
    PreemptionConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    StatsMonitorConfig,
    TimeLimitConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

DataKind: TypeAlias = Literal[
    "shuffled", "own generator", "weighted", "batch sampler", "stream", "full batches", "a list"
]
STEPS = 14
"""Two epochs of seven batches, the last one of which is short."""
STEPS_OF_TWO = 8
"""Steps of the same training on two processes."""


class AugmentedSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from the RNGs of torch, NumPy and Python while loading."""

    def __init__(self, length: int = 26, dtype: torch.dtype = torch.float32) -> None:
        self.length = length
        self.dtype = dtype

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(4, dtype=self.dtype) + np.random.rand() + random.random()
        return noise + index / 10, torch.tensor([float(index % 5)], dtype=self.dtype)


class NamedLosses(SimpleBatchProcessor):
    """Returns the loss, also by name; NaN for a batch with two targets of 0 if `fails`."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        inputs, targets = batch
        outputs = model(inputs)
        loss = torch.nn.functional.mse_loss(outputs, targets)
        if self.fails and model.training and int((targets == 0).sum()) > 1:
            loss = loss * float("nan")
        return {"outputs": outputs, "losses": {"squared": loss}}, loss

    def metric_inputs(self, outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs["outputs"].squeeze(1), batch[1].squeeze(1)


class StopBetweenEpochs(PipelineHooks):
    """Requests a stop at the end of the first epoch, after its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.on_epoch.after(self.stop)

    def stop(self, args: PipelineHookArgs) -> None:
        if args.epoch_id == 0 and args.epoch_completed:
            args.requests.stop("one epoch is enough for today")


def build(
    run_folder: Path,
    resume_from: Any,
    *,
    workers: int = 0,
    persistent: bool = False,
    resumed_workers: int | None = None,
    data: DataKind = "shuffled",
    keyed_by: Literal["batch", "sample"] = "batch",
    plateau: bool = False,
    accumulate: int = 3,
    patience: int = 50,
    min_delta: float = 0.0,
    saves: Literal["no", "every step", "in background"] = "no",
    more_hooks: bool = False,
    dies: int = 0,
    stop_between: bool = False,
) -> HookBasedTrainer:
    """Build a trainer with dropout, batch norm, augmentation, AdamW and an LR scheduler.

    Clipping, accumulation over 3, an EMA, metrics, evaluations, early stopping and a log are
    included.
    """
    if dies and run_folder.name == "resumed":
        starts = run_folder / "starts"
        with starts.open("a") as file:
            file.write(".")
        if starts.stat().st_size <= dies:
            DieAt(random.Random().randrange(250))  # a save makes about 25 file system calls
    if resume_from is not None and resumed_workers is not None:
        workers = resumed_workers
    several = in_several_processes()
    torch.set_num_threads(1)  # more threads slow a tiny model down
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Dropout(0.3),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    lr_scheduler: LRScheduler = (
        ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        if plateau
        else OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    )
    saving = SaveCheckpointConfig(
        every="1 step", keep_last=2, in_background=saves == "in background"
    )
    unseen = torch.linspace(-1, 1, 20).reshape(5, 4), torch.arange(5.0).unsqueeze(1)
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model,
        make_loader(data, num_workers=workers, persistent_workers=persistent),
        NamedLosses(fails=more_hooks),
        optimizer,
        lr_scheduler,
        [
            MetricsLoggerConfig(
                every="4 steps | 1 epoch",
                sinks=[JsonLinesSinkConfig(path=str(run_folder / "metrics.jsonl"))],
            ),
            GradientClippingHookConfig(max_norm=0.5),
            LossTrackerConfig(losses_key="losses"),
            MetricTrackerConfig()(
                metrics={"error": MeanSquaredError(), "correlation": PearsonCorrCoef()}
            ),
            EMAConfig(power=0.75),
            ValidationHookConfig(every="3 steps | 1 epoch", weights="EMA")(
                dataloaders={"val": DataLoader(TensorDataset(*unseen), batch_size=2, shuffle=True)},
                metrics={"error": MeanSquaredError()},
            ),
            EarlyStoppingConfig(
                monitor="eval/val/error", mode="min", patience=patience, min_delta=min_delta
            ),
            *([] if saves == "no" else [saving]),
            *(other_hooks(run_folder) if more_hooks else []),
            *([StopBetweenEpochs()] if stop_between and run_folder.name == "resumed" else []),
        ],
        max_epoch=2,
        run_folder=run_folder,
        resume_from=resume_from,
        # Accelerate shards a stream by a loader that ignores the state of the dataset.
        data_order=DataOrder(keyed_by=keyed_by, fast_forward=data == "stream" and several),
    )


def in_several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def other_hooks(run_folder: Path) -> list[PipelineHooksConfig[Any]]:
    """Return further stateful or observing hooks."""
    return [
        NonFiniteGuardConfig(policy="skip"),
        FreezeHookConfig(patterns=["0.*"], until_step=9),
        KeepBestConfig(monitor="eval/val/error", mode="max", path=run_folder / "best.safetensors"),
        SaveModelConfig(every="1 epoch", weights="EMA"),
        StatsMonitorConfig(),
        ProgressBarHookConfig(),
        ModelSummaryConfig(),
        ClearCacheHookConfig(every="5 steps"),
        PreemptionConfig(),
        TimeLimitConfig(limit="1 h"),
    ]


def make_loader(kind: DataKind, **options: Any) -> Iterable[Any]:
    """Return seven batches of data of one kind, or eight if all are full.

    With two ranks, each has two samples in the last step, as batch normalisation requires.
    """
    length = 28 if in_several_processes() else 26
    samples = AugmentedSamples(length)
    if kind == "shuffled":
        return DataLoader(samples, batch_size=4, shuffle=True, **options)
    if kind == "own generator":
        generator = torch.Generator().manual_seed(5)
        return DataLoader(samples, batch_size=4, shuffle=True, generator=generator, **options)
    if kind == "weighted":
        sampler = WeightedRandomSampler([*range(1, 27)], num_samples=28)
        return DataLoader(samples, batch_size=4, sampler=sampler, **options)
    if kind == "batch sampler":
        return DataLoader(samples, batch_sampler=PairsOfBatches(), **options)
    if kind == "full batches":
        return DataLoader(samples, batch_size=3, shuffle=True, drop_last=True, **options)
    if kind == "a list":
        generator = torch.Generator().manual_seed(5)
        sizes = (4, 4, 1, 4, 3, 4, 4)
        return [(torch.randn(n + 1, 4, generator=generator), torch.ones(n + 1, 1)) for n in sizes]
    return DataLoader(Stream(length), batch_size=4, **options)


class PairsOfBatches(Sampler[list[int]]):
    """Alternating batches of 3 and 5 samples, shuffled by NumPy."""

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        indices = np.random.permutation(28) % 26
        for batch in range(7):
            size = 3 if batch % 2 else 5
            yield [int(index) for index in indices[batch * 4 : batch * 4 + size]]


class Stream(IterableDataset[Any]):
    """Augmented samples in a fixed order that resumes at any position."""

    def __init__(self, length: int) -> None:
        self.samples = AugmentedSamples(length)
        self.epoch = self.position = 0
        self.is_resumed = False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if not self.is_resumed:
            self.position = 0
        self.is_resumed = False
        length = len(self.samples)
        while self.position < length:
            self.position += 1
            yield self.samples[(self.position * 9 + self.epoch) % length]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position, self.is_resumed = state["position"], True
