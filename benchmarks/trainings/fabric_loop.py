"""Loop on Lightning Fabric with its CSV logger and `Fabric.save`."""

import torch
from lightning.fabric import Fabric  # type: ignore[import-not-found]  # not in the dev extra
from lightning.fabric.loggers import CSVLogger  # type: ignore[import-not-found]  # as above
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type information

from benchmarks.trainings.workloads import Job


def train(job: Job) -> list[float]:
    fabric = Fabric(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if job.bf16 else "32-true",
        loggers=CSVLogger(str(job.folder)),
    )
    model, optimizer = fabric.setup(job.model, job.optimizer)
    loader, evaluation_loader = fabric.setup_dataloaders(job.training_loader, job.evaluation_loader)
    scheduler = job.scheduler
    evaluations = []
    step = 0
    for epoch in range(job.size.epochs):
        model.train()
        total = torch.zeros(())
        for batch in tqdm(loader, desc=f"epoch {epoch + 1}"):
            step += 1
            is_accumulating = step % job.accumulate != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                loss = job.loss(model, batch)
                fabric.backward(loss / job.accumulate)
            if not is_accumulating:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
            if step % job.size.log_every == 0:
                [rate] = scheduler.get_last_lr()
                fabric.log_dict({"loss": total / job.size.log_every, "lr": rate}, step=step)
                total = torch.zeros(())
        model.eval()
        total = torch.zeros(())
        with torch.inference_mode():
            for batch in evaluation_loader:
                total += job.loss(model, batch)
        evaluations.append(float(total) / len(evaluation_loader))
        fabric.log("evaluation_loss", evaluations[-1], step=step)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": epoch + 1}
        fabric.save(str(job.folder / f"epoch_{epoch + 1}.ckpt"), state)
    fabric.logger.finalize("success")
    return evaluations
