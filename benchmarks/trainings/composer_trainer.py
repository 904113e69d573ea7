"""Composer's Trainer with its progress bar, file logger and checkpoints."""

# mypy: disallow-subclassing-any=False
# (Composer is not in the dev extra, so its base classes have no type there.)

from typing import Any

import torch
from composer import Callback, ComposerModel, Trainer  # type: ignore[import-not-found]  # see above
from composer.loggers import FileLogger  # type: ignore[import-not-found]  # see above
from torchmetrics import MeanMetric, Metric

from benchmarks.trainings.workloads import Job


class Model(ComposerModel):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.job = job
        self.mean_loss = MeanMetric()

    def forward(self, batch: Any) -> torch.Tensor:
        with self.job.autocast():  # Composer's own is for GPUs
            return self.job.loss(self.model, batch)

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"loss": self.mean_loss}

    def update_metric(self, batch: Any, outputs: torch.Tensor, metric: Metric) -> None:
        metric.update(outputs)


class Evaluations(Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def eval_end(self, state: Any, logger: Any) -> None:
        self.losses.append(float(state.eval_metrics["eval"]["loss"].compute()))


def train(job: Job) -> list[float]:
    evaluations: list[float] = []
    trainer = Trainer(
        model=Model(job),
        # Composer divides a batch into micro-batches.
        train_dataloader=job.make_loader(job.training_set, batches=job.accumulate),
        device_train_microbatch_size=job.batch_size,
        eval_dataloader=job.evaluation_loader,
        max_duration=f"{job.size.epochs}ep",
        optimizers=job.optimizer,
        schedulers=job.scheduler,
        step_schedulers_every_batch=True,
        device="cpu",
        precision="fp32",
        callbacks=Evaluations(evaluations),
        progress_bar=True,
        loggers=FileLogger(
            str(job.folder / "log.txt"), flush_interval=job.size.log_every // job.accumulate
        ),
        save_folder=str(job.folder / "checkpoints"),
        save_interval="1ep",
        eval_interval="1ep",
    )
    trainer.fit()
    trainer.close()
    return evaluations
