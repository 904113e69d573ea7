"""Lightning's Trainer in its mode for measuring overhead, with callbacks as hooks."""

# mypy: disallow-subclassing-any=False
# (Lightning is not in the dev extra, so its base classes have no type there.)

import logging
import warnings
from typing import Any

import lightning  # type: ignore[import-not-found]  # see above
import torch

from benchmarks.workload import Batch, Job


class Module(lightning.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.job = job

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return self.job.loss(self.model(inputs), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        schedule = {"scheduler": self.job.scheduler, "interval": "step"}
        return {"optimizer": self.job.optimizer, "lr_scheduler": schedule}


class NoopCallback(lightning.Callback):
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers and the like
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            barebones=True,
            callbacks=[NoopCallback() for _ in range(hook_count)],
        )
        trainer.fit(Module(job), train_dataloaders=job.loader)
