"""Lightning's Trainer with its default logger, progress bar and checkpoints."""

# mypy: disallow-subclassing-any=False
# (Lightning is not in the dev extra, so its base classes have no type there.)

from typing import Any

import lightning  # type: ignore[import-not-found]  # see above
import torch

from benchmarks.trainings.workloads import Job


class Module(lightning.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.job = job
        self.evaluations: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.job.loss(self.model, batch)
        self.log("loss", loss, prog_bar=True, batch_size=self.job.batch_size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.job.loss(self.model, batch)
        self.log("evaluation_loss", loss, prog_bar=True, batch_size=self.job.batch_size)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.evaluations.append(float(self.trainer.callback_metrics["evaluation_loss"]))

    def configure_optimizers(self) -> dict[str, Any]:
        schedule = {"scheduler": self.job.scheduler, "interval": "step"}
        return {"optimizer": self.job.optimizer, "lr_scheduler": schedule}


def train(job: Job) -> list[float]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if job.bf16 else "32-true",
        accumulate_grad_batches=job.accumulate,
        max_epochs=job.size.epochs,
        log_every_n_steps=job.size.log_every // job.accumulate,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(save_top_k=-1)],
        default_root_dir=job.folder,
    )
    module = Module(job)
    trainer.fit(module, job.training_loader, job.evaluation_loader)
    return module.evaluations
