"""Ignite's engines with its progress bar, log handlers and checkpoints."""

from typing import Any

import torch
from ignite.engine import Engine, Events  # type: ignore[import-not-found]  # not in the dev extra
from ignite.handlers import Checkpoint, DiskSaver  # type: ignore[import-not-found]  # as above
from ignite.handlers.tqdm_logger import ProgressBar  # type: ignore[import-not-found]  # as above
from ignite.metrics import Average  # type: ignore[import-not-found]  # as above

from benchmarks.trainings.workloads import Job


def train(job: Job) -> list[float]:
    model, optimizer, scheduler = job.model, job.optimizer, job.scheduler
    evaluations: list[float] = []

    def update(engine: Engine, batch: Any) -> float:
        model.train()
        with job.autocast():
            loss = job.loss(model, batch)
        (loss / job.accumulate if job.accumulate > 1 else loss).backward()
        if engine.state.iteration % job.accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.item()

    def evaluation_step(engine: Engine, batch: Any) -> torch.Tensor:
        model.eval()
        with torch.inference_mode(), job.autocast():
            return job.loss(model, batch)

    trainer, evaluator = Engine(update), Engine(evaluation_step)
    Average().attach(evaluator, "loss")
    ProgressBar(persist=True).attach(trainer, output_transform=lambda loss: {"loss": loss})

    @trainer.on(Events.ITERATION_COMPLETED(every=job.size.log_every))  # type: ignore[untyped-decorator]  # see above
    def log(engine: Engine) -> None:
        [rate] = scheduler.get_last_lr()
        job.log(step=engine.state.iteration, loss=engine.state.output, lr=rate)

    @trainer.on(Events.EPOCH_COMPLETED)  # type: ignore[untyped-decorator]  # see above
    def evaluate(engine: Engine) -> None:
        evaluator.run(job.evaluation_loader)
        evaluations.append(float(evaluator.state.metrics["loss"]))
        job.log(step=engine.state.iteration, evaluation_loss=evaluations[-1])

    states = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    saver = DiskSaver(str(job.folder / "checkpoints"))
    checkpoint = Checkpoint(states, saver, n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run(job.training_loader, max_epochs=job.size.epochs)
    return evaluations
