"""Train a ResNet-18 to classify handwritten digits, from images on disk to saved weights.

    bash scripts/demo.sh                                       # about a minute on two CPU cores
    python examples/digits/train.py --max_epoch 10 --batch_size 128
    torchrun --standalone --nproc-per-node=2 examples/digits/train.py --batch_size 32
    python examples/digits/train.py --dataset.pipeline_test true --max_epoch 1   # random images

Every field with a description is a command line option; ``--help`` lists all options.
``digits.yaml`` describes the same training as a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from safetensors.torch import save_model
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import models

from digits_parts import DIGITS, Digits
from robo_orchard_core.utils.cli import SettingConfig, pydantic_from_argparse
from robo_orchard_lab.experiment.run_plan import count_lr_scheduler_steps
from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor, TrainerLimits
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    ProgressBarHookConfig,
    ReportConfig,
    SamplePredictionsConfig,
    StatsMonitorConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, TrackerSinkConfig
from robo_orchard_lab.utils import log_basic_config

VALIDATION = "eval/val/accuracy"  # fraction of unseen images classified correctly


# Configuration of the experiment, with checked fields that are saved and set by options.


class DatasetConfig(SettingConfig):
    """Training and validation images."""

    data_root: str = Field(
        default="workspace/digits/images",
        description="Folder of the images; if missing, scikit-learn's digits go there.",
    )
    pipeline_test: bool = Field(
        default=False, description="Use random images instead, to see whether everything runs."
    )
    dummy_train_imgs: int = Field(default=256, ge=1, description="Random images to learn from.")
    dummy_val_imgs: int = Field(default=64, ge=1, description="Random images to check with.")

    def open(self) -> tuple[Digits, Digits]:
        """Return the training and validation images."""
        train, val = self.dummy_train_imgs, self.dummy_val_imgs
        return (
            Digits(self.data_root, train=True, random_images=train if self.pipeline_test else None),
            Digits(self.data_root, train=False, random_images=val if self.pipeline_test else None),
        )


class TrainerConfig(SettingConfig):
    """Training of one model."""

    dataset: DatasetConfig = Field(default=DatasetConfig(), description="The images.")
    batch_size: int = Field(default=64, ge=2, description="Images in a batch, of each process.")
    num_workers: int = Field(default=0, ge=0, description="Processes that load images.")
    max_epoch: int = Field(default=5, ge=1, description="How often to go through the images.")
    learning_rate: float = Field(default=0.05, gt=0, description="The highest of the schedule.")
    max_grad_norm: float = Field(default=5.0, gt=0, description="Clip longer gradients to this.")
    seed: int = Field(default=0, ge=0, description="The same seed gives the same weights.")
    workspace_root: str = Field(
        default="workspace/digits", description="Folder for the weights and what was measured."
    )


def train(cfg: TrainerConfig) -> HookBasedTrainer:
    """Train a model as configured."""
    set_seed(cfg.seed)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():  # rank 0 writes the images
        images, unseen = cfg.dataset.open()
    batches = DataLoader(
        images, batch_size=cfg.batch_size, shuffle=True, drop_last=True, num_workers=cfg.num_workers
    )
    model = models.resnet18(num_classes=DIGITS)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=cfg.learning_rate, momentum=0.9, weight_decay=5e-4
    )
    accuracy = {"accuracy": MulticlassAccuracy(DIGITS, average="micro", validate_args=False)}
    workspace = Path(cfg.workspace_root)
    updates = count_lr_scheduler_steps(batches, accelerator, TrainerLimits(max_epoch=cfg.max_epoch))
    trainer = HookBasedTrainer(
        accelerator=accelerator,
        model=model,
        dataloader=batches,
        batch_processor=SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=cfg.learning_rate, total_steps=updates
        ),
        hooks=[  # the first is the outermost
            ReportConfig(),
            ProgressBarHookConfig(metrics=["train/accuracy", VALIDATION]),
            MetricsLoggerConfig(
                every="5 steps | 1 epoch",
                sinks=[
                    JsonLinesSinkConfig(path=str(workspace / "metrics.jsonl")),
                    TrackerSinkConfig(
                        trackers=["tensorboard"], project="tensorboard", folder=str(workspace)
                    ),
                ],
            ),
            StatsMonitorConfig(),
            LossTrackerConfig(),
            MetricTrackerConfig()(metrics=accuracy),
            GradientClippingHookConfig(max_norm=cfg.max_grad_norm),
            ValidationHookConfig(every="1 epoch")(
                dataloaders={"val": DataLoader(unseen, batch_size=256)}, metrics=accuracy
            ),
            KeepBestConfig(monitor=VALIDATION, mode="max", path=workspace / "best.safetensors"),
            SamplePredictionsConfig(mean=[0.5], std=[0.5]),
        ],
        run_folder=workspace,
        max_epoch=cfg.max_epoch,
    )
    trainer()
    return trainer


def main() -> None:
    log_basic_config()
    parser = argparse.ArgumentParser(description="Train a ResNet-18 to read handwritten digits.")
    cfg = pydantic_from_argparse(TrainerConfig, parser)
    trainer = train(cfg)
    if not trainer.accelerator.is_main_process:
        return

    workspace = Path(cfg.workspace_root).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    save_model(
        trainer.accelerator.unwrap_model(trainer.model), str(workspace / "model.safetensors")
    )
    cfg.save(workspace / "config.json")

    images = "random" if cfg.dataset.pipeline_test else Path(cfg.dataset.data_root).resolve()
    print(f"\nAccuracy on images it has not learned from: {trainer.metrics.latest(VALIDATION):.4f}")
    for what, where in (
        ("weights", workspace / "model.safetensors"),
        ("best weights", workspace / "best.safetensors"),
        ("configuration", workspace / "config.json"),
        ("metrics", workspace / "metrics.jsonl"),
        ("report", workspace / "report.html"),
        ("for TensorBoard", workspace / "tensorboard"),
        ("images", images),
    ):
        print(f"  {what:15}  {where}")


if __name__ == "__main__":
    main()
