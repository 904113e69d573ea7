"""How the pipeline is used, as a type checker sees it. Nothing here runs; mypy reads it.

An ``ignore`` marks what must be an error: mypy warns about one that is not needed.
"""

from typing import Any, assert_type

import torch
from accelerate import Accelerator

from robo_orchard_core.utils.hook import HookContext, HookContextChannel, RemovableHandle
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import GradientClippingHook, GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import (
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)


class MyHook(PipelineHooks):
    def __init__(self, cfg: "MyHookConfig") -> None:
        super().__init__()
        handle = self.register_hook(
            channel="on_step", hook=HookContext.from_callable(before=self.start, after=self.end)
        )
        assert_type(handle, RemovableHandle)
        self.register_hook("on_steps", HookContext.from_callable(self.start))  # type: ignore[arg-type]
        self.register_hook("on_step", HookContext.from_callable(self.wrong))  # type: ignore[arg-type]

    def start(self, args: PipelineHookArgs) -> None:
        assert_type(args.epoch_id, int)
        assert_type(args.max_step, int | None)
        assert_type(args.loss, torch.Tensor | None)
        assert_type(args.model, torch.nn.Module)
        assert_type(args.exception, BaseException | None)
        args.metrics.publish("loss", 1.0)
        args.metrics.publish("loss", "high")  # type: ignore[arg-type]
        args.requests.stop("enough")
        args.step_id = 3  # type: ignore[misc]

    def end(self, args: PipelineHookArgs) -> None: ...

    def wrong(self, number: int) -> None: ...


class MyHookConfig(PipelineHooksConfig[MyHook]):
    class_type: type[MyHook] = MyHook
    every: int = 5


class Processor(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor | None]:
        return model(batch), None


def build(model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    assert_type(MyHookConfig()(), MyHook)
    assert_type(GradientClippingHookConfig(max_norm=1.0)(), GradientClippingHook)
    trainer = HookBasedTrainer(
        accelerator=Accelerator(),
        model=model,
        dataloader=batches,
        batch_processor=Processor(need_backward=False),
        hooks=[MyHookConfig(), GradientClippingHookConfig(max_norm=1.0), PipelineHooks()],
        max_epoch=1,
    )
    HookBasedTrainer(Accelerator(), model, batches, model, max_epoch=1)  # type: ignore[arg-type]
    trainer.hooks += MyHookConfig()
    assert_type(trainer.hooks, PipelineHooks)
    trainer()


def dispatch(channel: HookContextChannel[str]) -> None:
    channel.register(HookContext.from_callable(before=str.upper))
    assert_type(channel.run("a", len), int)
    channel.run(3, abs)  # type: ignore[arg-type]
    with channel.begin("a"):
        pass
