"""Transformers' Trainer, with callbacks as hooks."""

# mypy: disallow-subclassing-any=False
# (mypy does not read Transformers, see pyproject.toml, so its base classes have no type.)

import tempfile
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.workload import BATCH_SIZE, Batch, Job


class JobTrainer(Trainer):
    """Transformers' Trainer with the job's loss instead of a language model's."""

    job: Job

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        return self.job.loss(model(inputs["inputs"]), inputs["classes"])


class NoopCallback(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    logging.set_verbosity_error()
    silent = {"logging_strategy": "no", "logging_nan_inf_filter": False, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder, **silent)
        for _ in range(hook_count):
            trainer.add_callback(NoopCallback())
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def make_trainer(job: Job, folder: str, **options: Any) -> JobTrainer:
    """Return a trainer with these training arguments and the common ones."""
    trainer = JobTrainer(
        model=job.model,
        args=TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,  # no clipping, as in all contenders
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            **options,
        ),
        train_dataset=job.dataset,
        data_collator=_as_dict,
        optimizers=(job.optimizer, job.scheduler),
    )
    trainer.job = job
    return trainer


def _as_dict(batch: Batch) -> dict[str, torch.Tensor]:
    # Transformers accepts batches as dicts only.
    inputs, classes = batch
    return {"inputs": inputs, "classes": classes}
