"""Lightning's Trainer with its default logger and progress bar."""

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path

import lightning  # type: ignore[import-not-found]  # not in the dev extra
import torch

from benchmarks.contenders.lightning_peer import Module
from benchmarks.workload import Batch, Job


class LoggingModule(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss


def train(job: Job, hook_count: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers and the like
        with (
            open(Path(folder) / "progress.txt", "w", encoding="utf-8") as shown,
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown),
        ):
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                default_root_dir=folder,
                enable_checkpointing=False,
            )
            trainer.fit(LoggingModule(job), train_dataloaders=job.loader)
