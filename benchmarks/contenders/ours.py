"""This project's trainer."""

import torch

from benchmarks.contenders.accelerate_loop import make_accelerator
from benchmarks.workload import Batch, Job
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.data import DataOrder, KeyedBy
from robo_orchard_lab.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks


class NoopHook(PipelineHooks):
    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.register_hook(
            "on_step", HookContext.from_callable(before=self.before, after=self.after)
        )

    def before(self, args: PipelineHookArgs) -> None:
        pass

    def after(self, args: PipelineHookArgs) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    make_trainer(job, hook_count)()


def make_trainer(
    job: Job,
    hook_count: int,
    keyed_by: KeyedBy = "none",
    run_folder: str | None = None,
    max_epoch: int = 1,
) -> HookBasedTrainer:
    """Return a trainer configured for loading without random numbers."""

    def forward(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        return logits, job.loss(logits, labels)

    return HookBasedTrainer(
        accelerator=make_accelerator(job),
        model=job.model,
        dataloader=job.loader,
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=job.optimizer,
        lr_scheduler=job.scheduler,
        hooks=[NoopHook(f"noop_{position}") for position in range(hook_count)],
        max_epoch=max_epoch,
        data_order=DataOrder(keyed_by=keyed_by),
        run_folder=run_folder,
    )
