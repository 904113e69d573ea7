"""Handwritten loop, with a progress bar, a log in JSON lines and `torch.save`: the reference."""

import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type information

from benchmarks.trainings.workloads import Job


def train(job: Job) -> list[float]:
    return _train(job, flush=False)


def train_flushed(job: Job) -> list[float]:
    """Train with checkpoints that are flushed to the disk."""
    return _train(job, flush=True)


def _train(job: Job, *, flush: bool) -> list[float]:
    model, optimizer, scheduler = job.model, job.optimizer, job.scheduler
    evaluations = []
    step = 0
    for epoch in range(job.size.epochs):
        model.train()
        total = torch.zeros(())
        for batch in tqdm(job.training_loader, desc=f"epoch {epoch + 1}"):
            with job.autocast():
                loss = job.loss(model, batch)
            (loss / job.accumulate if job.accumulate > 1 else loss).backward()
            step += 1
            if step % job.accumulate == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
            if step % job.size.log_every == 0:
                [rate] = scheduler.get_last_lr()
                job.log(step=step, loss=float(total) / job.size.log_every, lr=rate)
                total.zero_()
        evaluations.append(evaluate(job, model))
        job.log(step=step, evaluation_loss=evaluations[-1])
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "epoch": epoch + 1,
        }
        _save(state, job.folder / f"epoch_{epoch + 1}.pt", flush=flush)
    return evaluations


def evaluate(job: Job, model: Any) -> float:
    """Return the mean loss over the evaluation set."""
    model.eval()
    total = torch.zeros(())
    with torch.inference_mode(), job.autocast():
        for batch in job.evaluation_loader:
            total += job.loss(model, batch)
    return float(total) / len(job.evaluation_loader)


def _save(state: dict[str, Any], path: Path, *, flush: bool) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        if flush:
            file.flush()
            os.fsync(file.fileno())
