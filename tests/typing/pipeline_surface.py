"""Public types of the pipeline, checked by mypy; nothing here runs.

An ``ignore`` marks a required error: mypy warns about an unused one.
"""

from typing import Any, assert_type

import torch
from accelerate import Accelerator

from robo_orchard_core.utils.hook import HookContext, HookContextChannel, RemovableHandle
from robo_orchard_lab.pipeline import HookBasedTrainer, NamedSteps, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointInfo,
    CheckpointStore,
    Retention,
    SavedState,
)
from robo_orchard_lab.pipeline.hooks import GradientClippingHook, GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import (
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)
from robo_orchard_lab.pipeline.predictions import Predictions
from robo_orchard_lab.pipeline.trigger import EverySeconds, EverySteps, Last, Trigger
from robo_orchard_lab.testing import (
    TracedCall,
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    count_collectives,
    count_host_reads,
    run_hook,
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


class OnTrigger(PipelineHooks):
    def __init__(self, every: Trigger | str) -> None:
        super().__init__()
        self.register_hook("on_step", HookContext.from_callable(after=self.note), when=every)
        self.register_hook("on_step", HookContext.from_callable(after=self.note), when=5)  # type: ignore[arg-type]
        assert_type(self.register_at_commit(self.note, EverySteps(5)), RemovableHandle)

    def note(self, args: PipelineHookArgs) -> None: ...


def decorate(hooks: PipelineHooks) -> None:
    @hooks.on_step.before
    def bare(args: PipelineHookArgs) -> int:
        return args.step_id

    @hooks.on_epoch.after()
    def called(args: PipelineHookArgs) -> None: ...

    @hooks.on_step.after(when=EverySteps(100) | EverySeconds(60), name="timed")
    def triggered(args: PipelineHookArgs) -> str:
        return ""

    assert_type(bare(PipelineHookArgs()), int)
    called(PipelineHookArgs())
    assert_type(triggered(PipelineHookArgs()), str)
    hooks.on_step.after(when="100 steps | 1 epoch")(called)
    hooks.on_step.after("100 steps")  # type: ignore[call-overload]
    hooks.on_step.after(when=100)  # type: ignore[call-overload]

    @hooks.on_step.before  # type: ignore[type-var]
    def wrong(number: int) -> None: ...


def triggers() -> None:
    assert_type(Trigger.parse("100 steps"), Trigger)
    assert_type(EverySteps(100) | Last(), Trigger)
    _ = EverySteps(100) | "1 epoch"  # type: ignore[operator]


def test_a_hook() -> None:
    run = run_hook(MyHookConfig(every=2), steps=6, accumulate=2, model=torch.nn.Linear(4, 2))
    assert_type(run.metrics, dict[str, dict[int, float]])
    assert_type(run.hook, PipelineHooks)
    run_hook(
        [MyHookConfig, lambda: MyHookConfig()(), MyHookConfig()()], optimizer=torch.optim.AdamW
    )
    run_hook(MyHookConfig(), step=6)  # type: ignore[call-arg]
    run_hook(MyHookConfig(), steps="6")  # type: ignore[arg-type]
    assert_state_round_trip(MyHookConfig(), stop_at=[1, 2], epochs=2)
    assert_weights_unchanged(MyHookConfig, data=[torch.ones(2)])
    assert_no_device_sync(lambda: MyHookConfig(), allowed=2)
    with count_host_reads() as reads, count_collectives() as calls:
        assert_type(reads, list[TracedCall])
        assert_type(calls, list[TracedCall])


class Processor(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor | None]:
        return model(batch), None


class NamedProcessor(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> NamedSteps:
        assert_type((yield "g", model(batch).mean()), Any)
        return model(batch)


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
    named: dict[str, torch.optim.Optimizer] = {"g": torch.optim.SGD(model.parameters(), lr=0.1)}
    several = HookBasedTrainer(Accelerator(), model, batches, NamedProcessor(), named, max_epoch=1)
    assert_type(several.optimizers["g"], torch.optim.Optimizer)
    trainer.hooks += MyHookConfig()
    assert_type(trainer.hooks, PipelineHooks)
    trainer()
    assert_type(trainer.evaluate({"val": []}, weights={"ema": "EMA"}), dict[str, float])
    assert_type(trainer.predict([], weights="EMA"), Predictions)


def dispatch(channel: HookContextChannel[str]) -> None:
    channel.register(HookContext.from_callable(before=str.upper))
    assert_type(channel.run("a", len), int)
    channel.run(3, abs)  # type: ignore[arg-type]
    with channel.begin("a"):
        pass


def keep(store: CheckpointStore) -> None:
    with store as opened:
        assert_type(opened, CheckpointStore)
        assert_type(opened.save(1, {"model": {}}, metrics={"loss": 1.0}), CheckpointInfo)
        opened.save(1, [1])  # type: ignore[arg-type]
        pending = opened.prepare(1, {"model": {}})
        assert_type(pending.commit(), CheckpointInfo)
        assert_type(opened.load("last"), SavedState)
        assert_type(opened.load_newest(), SavedState | None)
    CheckpointStore("root", digest="md5")  # type: ignore[arg-type]
    Retention(mode="least")  # type: ignore[arg-type]
