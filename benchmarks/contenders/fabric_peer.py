"""Loop on Lightning Fabric, with its callbacks as hooks."""

from lightning.fabric import Fabric  # type: ignore[import-not-found]  # not in the dev extra

from benchmarks.workload import Job


class NoopCallback:
    def on_train_batch_start(self) -> None:
        pass

    def on_train_batch_end(self) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    fabric = Fabric(
        accelerator="cpu", devices=1, callbacks=[NoopCallback() for _ in range(hook_count)]
    )
    model, optimizer = fabric.setup(job.model, job.optimizer)
    loader = fabric.setup_dataloaders(job.loader)
    scheduler = job.scheduler
    model.train()
    for inputs, labels in loader:
        fabric.call("on_train_batch_start")
        optimizer.zero_grad()
        loss = job.loss(model(inputs), labels)
        fabric.backward(loss)
        optimizer.step()
        scheduler.step()
        fabric.call("on_train_batch_end")
