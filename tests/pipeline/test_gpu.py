"""Training on a GPU; skipped without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, export_weights, load_checkpoint
from robo_orchard_lab.pipeline.checkpoint.tensor_files import StagingPool
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.trainer.setup import CopyStream
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


def test_weights_are_bit_identical_on_a_gpu() -> None:
    """Batches are moved to the GPU, and weights equal a plain loop's on the GPU."""
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


def test_the_progress_bar_waits_for_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Each step shows a loss, one step late, without a synchronization of the GPU."""
    sync = PipelineHooks()
    set_mode = torch.cuda.set_sync_debug_mode
    sync.register_hook(
        "on_step",
        HookContext.from_callable(lambda args: set_mode("error"), lambda args: set_mode("default")),
    )
    train(make_model(), [sync, ProgressBarHookConfig(refresh_seconds=1e-9)])
    lines = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert len([line for line in lines if "loss" in line]) >= 7


def test_fp16_skips_an_overflow() -> None:
    """Updates with overflowing gradients are skipped and counted with the gradient scaler."""
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
    """Between logging points nothing synchronizes with the device, clipping included."""
    checked = PipelineHooks()

    def forbid(args: Any) -> None:
        if args.global_step_id == 1:  # the first step may synchronize for its setup
            torch.cuda.set_sync_debug_mode("error")

    checked.register_hook("on_step", HookContext.from_callable(before=forbid))
    try:
        train(make_model(), [checked, GradientClippingHookConfig(max_norm=1.0)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_overlap_with_steps() -> None:
    """A batch from pinned memory is copied while the device is busy with earlier steps."""
    place = CopyStream(torch.device("cuda", torch.cuda.current_device()))
    host = torch.ones(2**20).pin_memory()
    place([host])  # does its one-time setup
    torch.cuda.synchronize()
    copied = torch.cuda.Event()
    torch.cuda._sleep(10**9)  # about half a second on the compute stream
    placed = place({"inputs": host})["inputs"]
    copied.record(place.stream)
    copied.synchronize()
    assert not torch.cuda.current_stream().query()  # still asleep
    assert float(placed.sum()) == 2**20
    torch.cuda.synchronize()


def test_memory_of_a_batch_stays_until_its_step_is_over() -> None:
    """The memory of a released batch is not overwritten while its step waits on the device."""
    place = CopyStream(torch.device("cuda", torch.cuda.current_device()))
    totals = []
    for value in range(20):
        batch = place(torch.full((2**20,), float(value)).pin_memory())
        torch.cuda._sleep(10**6)
        totals.append(batch.sum())  # launched, and the batch is dropped
        del batch
    assert [float(total) / 2**20 for total in totals] == list(range(20))


def test_batches_are_placed() -> None:
    """At the start of a step, every tensor of a batch is on the device with equal values."""
    placed: list[Any] = []
    watch = PipelineHooks()
    watch.on_step.before(lambda args: placed.append(args.batch))
    train(make_model(), [watch])
    expected = [batch for _ in range(2) for batch in make_loader()]
    for batch, given in zip(placed, expected, strict=True):
        assert all(tensor.is_cuda for tensor in batch)
        assert equal([tensor.cpu() for tensor in batch], list(given))


def test_nothing_synchronizes_between_logging_points() -> None:
    """Observing hooks, weight hooks and accumulation do not synchronize between logging points."""
    watch = PipelineHooks()

    @watch.on_step.before(when="at steps 4")
    def forbid(args: Any) -> None:  # the first update may synchronize for its setup
        torch.cuda.set_sync_debug_mode("error")

    @watch.on_epoch.after
    def allow(args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    hooks = [
        watch,
        LossTrackerConfig(),
        StatsMonitorConfig(),
        NonFiniteGuardConfig(read="at logging points"),
        GradientClippingHookConfig(max_norm=0.1),
        EMAConfig(decay=0.5),
        MetricsLoggerConfig(every="1000 steps"),
    ]
    try:
        train(make_model(), hooks, gradient_accumulation_steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_devices_rng_is_resumed(tmp_path: Path) -> None:
    """A stopped and resumed run with dropout on the GPU equals an uninterrupted run."""

    def run(stop_at: int | None, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(make_model(), torch.nn.Dropout(0.5))
        watch = PipelineHooks()
        if stop_at is not None:
            when = f"at steps {stop_at}"
            watch.on_step.after(when=when)(lambda args: args.requests.stop("enough"))
        HookBasedTrainer(
            Accelerator(),
            model,
            make_loader(),
            SimpleBatchProcessor.from_callable(loss_of),
            torch.optim.AdamW(model.parameters(), lr=0.01),
            hooks=[watch, SaveCheckpointConfig(folder=tmp_path / str(stop_at), every=None)],
            max_epoch=2,
            **options,
        )()
        return weights(model)

    uninterrupted = run(None)
    run(3)
    torch.rand(5, device="cuda")
    assert equal(uninterrupted, run(None, resume_from=tmp_path / "3" / "last"))


def test_background_saves_hold_the_state_of_their_step(tmp_path: Path) -> None:
    """Background saves hold the weights of their step while training changes the weights."""
    kept: dict[int, list[torch.Tensor]] = {}
    watch = PipelineHooks()

    @watch.on_optimizer_step.after
    def keep(args: Any) -> None:
        kept[args.global_step_id + 1] = weights(args.model)

    saves = SaveCheckpointConfig(
        folder=tmp_path, every="5 steps", in_background=True, keep_last=None
    )
    trainer = train(make_model(), [watch, saves])
    names = [name for name, _ in trainer.model.named_parameters()]
    infos = CheckpointStore(tmp_path).list()
    assert [info.step for info in infos] == [5, 10, 14]
    for info in infos:
        found = load_checkpoint(info.path).parts["model"]
        assert equal([found[name] for name in names], [w.cpu() for w in kept[info.step]])


def test_copies_for_the_background_are_pinned() -> None:
    """Staging memory is pinned and reused."""
    pool = StagingPool(pinned=True)
    tensors = {"w": torch.arange(5.0, device="cuda")}
    layout = pool.layout("model.safetensors", tensors)
    buffer = pool.acquire([layout])
    (file,) = buffer.fill([(layout, tensors)])
    assert torch.frombuffer(file, dtype=torch.uint8).is_pinned()
    assert torch.equal(layout.tensors[0].view(file[len(layout.header) :]), torch.arange(5.0))
    pool.release(buffer)
    assert pool.acquire([layout]) is buffer


@pytest.mark.parametrize("kind", ["ddp", "sharded", "plugin"])
def test_a_group_of_one_with_nccl(kind: str, tmp_path: Path) -> None:
    """DDP, FSDP2 and Accelerate's FSDP2 train, save and resume without synchronizing in a step."""
    launch(SCRIPTS / "gpu_group.py", kind, tmp_path, processes=1, timeout_s=400)
    found = torch.load(tmp_path / "found.pt")
    uninterrupted, resumed = found["straight"], found["resumed"]
    assert equal(list(uninterrupted["weights"].values()), list(resumed["weights"].values()))
    assert torch.equal(uninterrupted["losses"][-4:], resumed["losses"])
    export_weights(tmp_path / "straight" / "last", tmp_path / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == uninterrupted["weights"].keys()
    assert all(torch.equal(exported[name], uninterrupted["weights"][name]) for name in exported)
