"""Loop on Accelerate with its tracker and `save_state`."""

# mypy: disallow-subclassing-any=False
# (Accelerate ships no type information.)

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type information

from benchmarks.trainings.workloads import Job


class JsonLinesTracker(GeneralTracker):
    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    @property
    def tracker(self) -> Job:
        return self.job

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.job.log(step=step or 0, **values)


def train(job: Job) -> list[float]:
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if job.bf16 else "no",
        gradient_accumulation_steps=job.accumulate,
        log_with=JsonLinesTracker(job),
    )
    accelerator.init_trackers("training")
    model, optimizer, scheduler, loader, evaluation_loader = accelerator.prepare(
        job.model, job.optimizer, job.scheduler, job.training_loader, job.evaluation_loader
    )
    evaluations = []
    step = 0
    for epoch in range(job.size.epochs):
        model.train()
        total = torch.zeros(())
        for batch in tqdm(loader, desc=f"epoch {epoch + 1}"):
            with accelerator.accumulate(model):
                loss = job.loss(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            total += loss.detach()
            if step % job.size.log_every == 0:
                [rate] = scheduler.get_last_lr()
                values = {"loss": float(total) / job.size.log_every, "lr": rate}
                accelerator.log(values, step=step)
                total.zero_()
        model.eval()
        total = torch.zeros(())
        with torch.inference_mode():
            for batch in evaluation_loader:
                total += accelerator.gather_for_metrics(job.loss(model, batch))
        evaluations.append(float(total) / len(evaluation_loader))
        accelerator.log({"evaluation_loss": evaluations[-1]}, step=step)
        accelerator.save_state(str(job.folder / f"epoch_{epoch + 1}"))
    accelerator.end_training()
    return evaluations
