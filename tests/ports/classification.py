"""Image classification with mixup, cutmix and averaged weights, as torchvision's reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from porting import EpochOrder, State, logged, trained_state
from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor
from robo_orchard_lab.pipeline.hooks import (
    EMA,
    EMAConfig,
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

EPOCHS, WARMUP_EPOCHS, BATCH, CLASSES = 4, 1, 8, 4
EMA_EVERY, EMA_DECAY = 2, 0.8

Batch = tuple[torch.Tensor, torch.Tensor]


class Quadrants(Dataset[Batch]):
    """Noisy images; the class is the brightest quadrant."""

    def __init__(self, images: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (images,), generator=generator)
        self.images = torch.rand(images, 3, 8, 8, generator=generator)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[:, row : row + 4, column : column + 4] += 0.3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]


class ConvNet(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(9 * width, CLASSES),
        )


def make_mix() -> nn.Module:
    mixes = [v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)]
    return v2.RandomChoice(mixes)  # type: ignore[no-any-return]  # an untyped call


def loaders() -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    train, unseen = Quadrants(images=44, seed=1), Quadrants(images=20, seed=2)
    return (
        DataLoader(
            train,
            batch_size=BATCH,
            sampler=EpochOrder(train),
            drop_last=True,
            generator=torch.Generator(),
        ),
        DataLoader(unseen, batch_size=BATCH, generator=torch.Generator()),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD without weight decay for norms and biases."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def make_scheduler(optimizer: torch.optim.Optimizer) -> SequentialLR:
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP_EPOCHS)
    cosine = CosineAnnealingLR(optimizer, T_max=EPOCHS - WARMUP_EPOCHS)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP_EPOCHS])


def without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out the counters of batches, which AveragedModel averages and truncates."""
    return {name: value for name, value in state.items() if "num_batches" not in name}


# Plain loop


@torch.no_grad()
def evaluate(model: nn.Module, criterion: nn.Module, batches: DataLoader[Batch]) -> list[float]:
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in batches:
        outputs = model(images)
        loss += criterion(outputs, labels).item() * len(labels)
        correct += int((outputs.argmax(1) == labels).sum())
        count += len(labels)
    model.train(was_training)
    return [loss / count, correct / count]


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    model, criterion, mix = ConvNet(), nn.CrossEntropyLoss(label_smoothing=0.1), make_mix()
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer)
    train, unseen = loaders()
    average = get_ema_multi_avg_fn(EMA_DECAY)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    first_epoch, values, checkpoint = 0, {}, folder / "checkpoint.pth"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first_epoch, values = saved["epoch"] + 1, saved["values"]
    for epoch in range(first_epoch, EPOCHS):
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # an EpochOrder
        losses = []
        for index, (images, labels) in enumerate(train):
            images, labels = mix(images, labels)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if index % EMA_EVERY == 0:
                ema.update_parameters(model)
                if epoch < WARMUP_EPOCHS:  # the average is a copy until the end of the warm-up
                    ema.n_averaged.fill_(0)
        scheduler.step()
        found = evaluate(model, criterion, unseen) + evaluate(ema, criterion, unseen)
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}, validation {found}")
        values[(epoch + 1) * len(train)] = found
        torch.save(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch,
                "values": values,
            },
            checkpoint,
        )
    return {
        "model": model.state_dict(),
        "average": without_counters(ema.module.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict()["_last_lr"],
        "loss": {"metrics": {step: value[0] for step, value in values.items()}},
        "accuracy": {"metrics": {step: value[1] for step, value in values.items()}},
        "average loss": {"metrics": {step: value[2] for step, value in values.items()}},
        "average accuracy": {"metrics": {step: value[3] for step, value in values.items()}},
    }


# With the trainer


class MixingProcessor(SupervisedProcessor):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self.mix = make_mix()

    def forward(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(model, self.mix(*batch) if model.training else batch)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = make_optimizer(model)
    train, unseen = loaders()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    accuracy = {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
    validation = ValidationHookConfig(weights={"model": None, "average": "EMA"})
    return HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        train,
        MixingProcessor(nn.CrossEntropyLoss(label_smoothing=0.1)),
        optimizer,
        make_scheduler(optimizer),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch", sinks=[log]),
            GradientClippingHookConfig(max_norm=1.0),
            EMAConfig(
                decay=EMA_DECAY,
                update_every=EMA_EVERY,
                update_after_step=WARMUP_EPOCHS * len(train),
                copy_first=True,
                use_buffers=True,
            ),
            validation(dataloaders={"val": unseen}, metrics=accuracy),
            SaveCheckpointConfig(),
        ],
        max_epoch=EPOCHS,
        lr_scheduler_every="epoch",
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    assert trainer.lr_scheduler is not None
    ema = trainer.hooks["EMA"]
    assert isinstance(ema, EMA)
    log = run_folder / "log.jsonl"
    return {
        **trained_state(trainer),
        "average": without_counters(ema.weights()),
        "scheduler": trainer.lr_scheduler.get_last_lr(),
        "loss": {"metrics": logged(log, "eval/val/model/loss")},
        "accuracy": {"metrics": logged(log, "eval/val/model/accuracy")},
        "average loss": {"metrics": logged(log, "eval/val/average/loss")},
        "average accuracy": {"metrics": logged(log, "eval/val/average/accuracy")},
    }
