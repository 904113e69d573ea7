"""MMEngine's Runner with its default hooks."""

# mypy: disallow-subclassing-any=False
# (MMEngine is not in the dev extra, so its base classes have no type there.)

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, Evaluator  # type: ignore[import-not-found]  # see above
from mmengine.model import BaseModel  # type: ignore[import-not-found]  # see above
from mmengine.optim import OptimWrapper, StepLR  # type: ignore[import-not-found]  # see above
from mmengine.runner import Runner  # type: ignore[import-not-found]  # see above

from benchmarks.trainings.workloads import LR_FACTOR, Job


class Model(BaseModel):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.job = job

    def forward(self, *parts: Any, mode: str, **named_parts: Any) -> Any:
        # MMEngine passes the items of a batch; its AmpOptimWrapper requires a GPU.
        with self.job.autocast():
            loss = self.job.loss(self.model, named_parts or parts)
        return {"loss": loss} if mode == "loss" else [loss]


class MeanLoss(BaseMetric):
    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[float] = []

    def process(self, data_batch: Any, data_samples: Sequence[torch.Tensor]) -> None:
        self.results += [float(loss) for loss in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        self.evaluations.append(sum(results) / len(results))
        return {"loss": self.evaluations[-1]}


def train(job: Job) -> list[float]:
    metric = MeanLoss()
    optimizer = job.make_optimizer()  # MMEngine's own LR scheduler wraps it
    schedule = StepLR(
        optimizer, step_size=job.epoch_updates * job.accumulate, gamma=LR_FACTOR, by_epoch=False
    )
    runner = Runner(
        model=Model(job),
        work_dir=str(job.folder),
        train_dataloader=job.training_loader,
        train_cfg={"by_epoch": True, "max_epochs": job.size.epochs, "val_interval": 1},
        val_dataloader=job.evaluation_loader,
        val_cfg={},
        val_evaluator=Evaluator(metric),
        optim_wrapper=OptimWrapper(optimizer, accumulative_counts=job.accumulate),
        param_scheduler=schedule,
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": job.size.log_every},
            "checkpoint": {"type": "CheckpointHook", "interval": 1},
        },
    )
    runner.train()
    return metric.evaluations
