"""Transformers' Trainer with its default log, progress bar and checkpoints."""

# mypy: disallow-subclassing-any=False
# (mypy does not read Transformers, see pyproject.toml, so its base classes have no type.)

from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from benchmarks.trainings.workloads import Job

BATCH = "batch"


class Model(torch.nn.Module):
    """Model in the form that Transformers expects: its output has the loss."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.loss = job.loss

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.loss(self.model, batch)}


def train(job: Job) -> list[float]:
    trainer = Trainer(
        model=Model(job),
        args=TrainingArguments(
            output_dir=str(job.folder),
            use_cpu=True,
            bf16=job.bf16,
            num_train_epochs=job.size.epochs,
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            gradient_accumulation_steps=job.accumulate,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,  # no clipping, as in all contenders
            logging_steps=job.size.log_every // job.accumulate,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to="none",
            remove_unused_columns=False,
            label_names=[BATCH],  # so that an evaluation computes the loss
            prediction_loss_only=True,
        ),
        train_dataset=job.training_set,
        eval_dataset=job.evaluation_set,
        data_collator=_as_dict,
        optimizers=(job.optimizer, job.scheduler),
    )
    trainer.train()
    return [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]


def _as_dict(samples: list[Any]) -> dict[str, Any]:
    return {BATCH: default_collate(samples)}
