"""RoboOrchardLab's trainer, as in its tutorial on custom hooks.

The contender runs in its own environment with RoboOrchardLab's import names.
"""

from typing import Any

import torch

from benchmarks.contenders.accelerate_loop import make_accelerator
from benchmarks.workload import Batch, Job
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks.mixin import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)


class Processor(SimpleBatchProcessor):
    job: Job

    def forward(
        self, model: torch.nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs, labels = batch
        logits = model(inputs)
        return logits, self.job.loss(logits, labels)


class NoopHook(PipelineHooks):
    def __init__(self, cfg: "NoopHookConfig") -> None:
        super().__init__()
        self.cfg = cfg
        self.register_hook(
            channel="on_step",
            hook=HookContext.from_callable(before=self.before, after=self.after),
        )

    def before(self, args: PipelineHookArgs) -> None:
        pass

    def after(self, args: PipelineHookArgs) -> None:
        pass


class NoopHookConfig(PipelineHooksConfig[NoopHook]):
    class_type: type[NoopHook] = NoopHook


def train(job: Job, hook_count: int) -> None:
    processor = Processor(need_backward=True)
    processor.job = job
    hooks: list[Any] = [NoopHookConfig() for _ in range(hook_count)]
    trainer = HookBasedTrainer(
        model=job.model,
        dataloader=job.loader,
        optimizer=job.optimizer,
        lr_scheduler=job.scheduler,
        accelerator=make_accelerator(job),
        batch_processor=processor,
        max_epoch=1,
        hooks=hooks,
    )
    trainer()
