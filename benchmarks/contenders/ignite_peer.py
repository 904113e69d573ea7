"""Ignite's Engine around the bare loop's step, with handlers as hooks."""

import torch
from ignite.engine import Engine, Events  # type: ignore[import-not-found]  # not in the dev extra

from benchmarks.workload import Batch, Job


class NoopHandler:
    def before(self, engine: Engine) -> None:
        pass

    def after(self, engine: Engine) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    model, optimizer, scheduler = job.model, job.optimizer, job.scheduler

    def update(engine: Engine, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        optimizer.zero_grad()
        loss = job.loss(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    trainer = Engine(update)
    for _ in range(hook_count):
        handler = NoopHandler()
        trainer.add_event_handler(Events.ITERATION_STARTED, handler.before)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handler.after)
    model.train()
    trainer.run(job.loader, max_epochs=1)
