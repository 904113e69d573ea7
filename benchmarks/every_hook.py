"""Training with every built-in hook on, for tests and benchmarks of long runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.workload import CLASSES, Batch, Job, Settings
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    ClearCacheHookConfig,
    EarlyStoppingConfig,
    EMAConfig,
    FreezeHookConfig,
    GradientClippingHookConfig,
    HookProfilerConfig,
    KeepBestConfig,
    LogImagesConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    ModelSummaryConfig,
    NonFiniteGuardConfig,
    PreemptionConfig,
    ProgressBarHookConfig,
    ReportConfig,
    SamplePredictionsConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    StatsMonitorConfig,
    TimeLimitConfig,
    TorchProfilerHookConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig

EPOCH_STEPS = 500


class AtEachStep(PipelineHooks):
    """Calls a function at the start of each step with the number of completed steps."""

    def __init__(self, call: Callable[[int], None]) -> None:
        super().__init__()
        self._call = call
        self.register_hook("on_step", HookContext.from_callable(before=self._begin))

    def _begin(self, args: PipelineHookArgs) -> None:
        self._call(args.global_step_id)


def trainer_with_every_hook(
    folder: Path, steps: int, at_each_step: Callable[[int], None]
) -> HookBasedTrainer:
    """Return a trainer of the tiny model that saves and evaluates each epoch."""
    job, unseen = Job(Settings(steps=EPOCH_STEPS)), Job(Settings(steps=10))

    def begin_step(step: int) -> None:
        job.model.forward_began_ns.clear()  # remove marks of other benchmarks
        at_each_step(step)

    def forward(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        return logits, job.loss(logits, labels)

    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=job.model,
        dataloader=job.loader,
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=job.optimizer,
        lr_scheduler=job.scheduler,
        hooks=[AtEachStep(begin_step), *_every_hook(folder, unseen.loader)],
        max_step=steps,
        run_folder=folder,
    )


def _every_hook(folder: Path, unseen: Iterable[Batch]) -> list[Any]:
    def metric_inputs(outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs, batch[1]

    return [
        ProgressBarHookConfig(plain=True),
        MetricsLoggerConfig(
            sinks=[JsonLinesSinkConfig(path=str(folder / "metrics.jsonl")), LogSinkConfig()]
        ),
        StatsMonitorConfig(),
        LossTrackerConfig(),
        LogImagesConfig(every="1 epoch", key="0", mean=[0.5], std=[0.1]),
        SamplePredictionsConfig(mean=[0.5], std=[0.1]),
        ReportConfig(every_seconds=3600),
        MetricTrackerConfig()(metrics={"accuracy": _accuracy()}, metric_inputs=metric_inputs),
        GradientClippingHookConfig(max_norm=10.0),
        NonFiniteGuardConfig(policy="skip"),
        EMAConfig(),
        FreezeHookConfig(patterns=["0.bias"], until_step=100),
        ValidationHookConfig(every="1 epoch", weights="EMA")(
            dataloaders={"val": unseen},
            metrics={"accuracy": _accuracy()},
            metric_inputs=metric_inputs,
        ),
        EarlyStoppingConfig(monitor="eval/val/loss", mode="min", patience=1_000_000),
        KeepBestConfig(monitor="eval/val/loss", mode="min", path=folder / "best.safetensors"),
        SaveModelConfig(every="1 epoch", weights="EMA"),
        SaveCheckpointConfig(every="1 epoch", keep_last=2),
        ModelSummaryConfig(),
        ClearCacheHookConfig(),
        TorchProfilerHookConfig(folder=str(folder / "traces"), start_step=10, steps=2),
        HookProfilerConfig(),
        PreemptionConfig(),
        TimeLimitConfig(limit="10 h"),
    ]


def _accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(CLASSES, average="micro", validate_args=False)
