"""This project's trainer with its default hooks, evaluation and checkpoints."""

from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.trainings.workloads import Job
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig


def train(job: Job) -> list[float]:
    return _train(job, in_background=False)


def train_in_background(job: Job) -> list[float]:
    """Train while checkpoints are written."""
    return _train(job, in_background=True)


def _train(job: Job, *, in_background: bool) -> list[float]:
    def forward(model: Any, batch: Any) -> tuple[None, torch.Tensor]:
        return None, job.loss(model, batch)

    trainer = HookBasedTrainer(
        accelerator=Accelerator(
            cpu=True,
            mixed_precision="bf16" if job.bf16 else "no",
            gradient_accumulation_steps=job.accumulate,
        ),
        model=job.model,
        dataloader=job.training_loader,
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=job.optimizer,
        lr_scheduler=job.scheduler,
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(
                every=f"{job.size.log_every} steps | 1 epoch",
                sinks=[JsonLinesSinkConfig(path=str(job.folder / "metrics.jsonl"))],
            ),
            ValidationHookConfig()(dataloaders={"val": job.evaluation_loader}),
            SaveCheckpointConfig(in_background=in_background),
        ],
        max_epoch=job.size.epochs,
        run_folder=job.folder,
    )
    evaluations: list[float] = []
    with trainer.metrics.subscribe("eval/val/loss", lambda found: evaluations.append(found.value)):
        trainer()
    return evaluations
