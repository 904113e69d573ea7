"""Handwritten loop: the reference."""

import torch

from benchmarks.workload import Job


def train(job: Job, hook_count: int) -> None:
    if hook_count:
        raise ValueError("a bare loop has no hooks")
    model, optimizer, scheduler = job.model, job.optimizer, job.scheduler
    accumulate = job.settings.accumulate
    model.train()
    if accumulate == 1 and not job.settings.bf16:
        for inputs, labels in job.loader:
            optimizer.zero_grad()
            loss = job.loss(model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
        return
    for step, (inputs, labels) in enumerate(job.loader, start=1):
        if job.settings.bf16:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(inputs).float()
        else:
            logits = model(inputs)
        loss = job.loss(logits, labels)
        if accumulate > 1:
            loss = loss / accumulate
        loss.backward()
        if step % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
