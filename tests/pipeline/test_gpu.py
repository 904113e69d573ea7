"""Training on a GPU; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.trainer.placement import CopyStream
from tiny import equal, loss_of, make_loader, make_model, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def train(model: torch.nn.Module, hooks: Any = None, **accelerator: Any) -> HookBasedTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = HookBasedTrainer(
        Accelerator(**accelerator),
        model,
        make_loader(pin_memory=True),
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        hooks=hooks,
        max_epoch=2,
    )
    trainer()
    return trainer


def test_bit_identical_on_a_gpu() -> None:
    """The batches are moved there, and the weights are those of a plain loop there."""
    model = make_model()
    train(model)
    reference = make_model().cuda()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for _ in range(2):
        for inputs, targets in make_loader():
            loss_of(reference, (inputs.cuda(), targets.cuda()))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equal(weights(model), weights(reference))


def test_fp16_skips_an_overflow() -> None:
    """With the scaler, the first huge gradients are skipped, and the counters tell."""
    model = make_model()
    spoil = PipelineHooks()
    spoil.register_hook(
        "on_batch",
        HookContext.from_callable(
            before=lambda args: args.batch[0].fill_(6e4) if args.global_step_id == 3 else None
        ),
    )
    trainer = train(
        model, [GradientClippingHookConfig(max_norm=1.0), spoil], mixed_precision="fp16"
    )
    progress = trainer.progress
    assert progress.skipped_optimizer_steps >= 1
    assert progress.optimizer_step_id + progress.skipped_optimizer_steps == 14
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_step_path_never_waits_for_the_device() -> None:
    """Between logging points nothing reads from the device, clipping included."""
    checked = PipelineHooks()

    def forbid(args: Any) -> None:
        if args.global_step_id == 1:  # the first step may set up what it likes
            torch.cuda.set_sync_debug_mode("error")

    checked.register_hook("on_step", HookContext.from_callable(before=forbid))
    try:
        train(make_model(), [checked, GradientClippingHookConfig(max_norm=1.0)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_run_beside_the_steps() -> None:
    """A batch from pinned memory is copied while the device is busy with earlier steps."""
    place = CopyStream(torch.device("cuda", torch.cuda.current_device()))
    host = torch.ones(2**20).pin_memory()
    place([host])  # sets up what it needs
    torch.cuda.synchronize()
    copied = torch.cuda.Event()
    torch.cuda._sleep(10**9)  # some half a second of the stream of the steps
    placed = place({"inputs": host})["inputs"]
    copied.record(place.stream)
    copied.synchronize()
    assert not torch.cuda.current_stream().query()  # which is still asleep
    assert float(placed.sum()) == 2**20
    torch.cuda.synchronize()


def test_memory_of_a_batch_stays_until_its_step_is_over() -> None:
    """A batch that is dropped while its step waits on the device is not overwritten by the next."""
    place = CopyStream(torch.device("cuda", torch.cuda.current_device()))
    totals = []
    for value in range(20):
        batch = place(torch.full((2**20,), float(value)).pin_memory())
        torch.cuda._sleep(10**6)
        totals.append(batch.sum())  # launched, and the batch is dropped
        del batch
    assert [float(total) / 2**20 for total in totals] == list(range(20))
