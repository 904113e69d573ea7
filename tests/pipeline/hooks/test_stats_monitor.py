"""Step times, memory, learning rates and gradient norms."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # as in the hook
import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import StepLR

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import ChannelName
from robo_orchard_lab.pipeline.hooks.stats_monitor import StatsMonitorConfig
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    run_hook,
)
from tiny import loss_of, make_loader, make_model, make_trainer

NAP_S = 0.1  # longer than the pauses of a loaded machine
"""Much longer than anything else in a step of the tiny model."""
TIMES = ("perf/data_s", "perf/compute_s", "perf/hooks_s")


def nap(*_: object) -> None:
    time.sleep(NAP_S)


def napping(channel: ChannelName, role: str) -> PipelineHooks:
    """Return a hook that sleeps once each time its channel is open."""
    hooks = PipelineHooks(f"naps {role} {channel}")
    getattr(getattr(hooks, channel), role)(nap)
    return hooks


def sleepy_forward(model: Any, batch: Any) -> Any:
    nap()
    return loss_of(model, batch)


class SleepyLoader:
    """Loader that sleeps before each batch and has no length."""

    def __iter__(self) -> Iterator[Any]:
        for batch in make_loader(2):
            nap()
            yield batch


class SleepyCommit(PipelineHooks):
    """Hook with slow work at the commit point of each step."""

    def __init__(self, kind: str, file: Path) -> None:
        super().__init__("slow")
        self.kind, self.file = kind, file
        self.on_loop.before(self._begin)
        self.register_at_commit(self._ask, "1 step")

    def _begin(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = nap
        args.run.weight_sets[self.name] = self
        if self.kind == "log":
            args.metrics.listen(nap)

    def applied(self) -> Any:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        nap()
        return {}

    def _ask(self, args: PipelineHookArgs) -> None:
        if self.kind == "evaluate":
            args.requests.evaluate("it is time")
        elif self.kind == "save":
            args.requests.save_weights(self.file, "it is time", weights=self.name)
        else:
            args.requests.log("it is time")


def naps(*hooks: Any, **setting: Any) -> list[int]:
    """Return the naps per step of the last window: waiting, computing and hooks."""
    setting = {"data": make_loader(2), "epochs": 2, "log_every": "last", **setting}
    metrics = run_hook(hooks, **setting).metrics
    last = max(metrics["perf/data_s"])
    seconds = [metrics[name][last] for name in TIMES]
    for taken in seconds:
        assert taken % NAP_S < 0.7 * NAP_S  # a nap lasts at least its time
    assert metrics["perf/steps_per_s"][last] == pytest.approx(1 / sum(seconds))
    return [math.floor(taken / NAP_S) for taken in seconds]


MONITOR = StatsMonitorConfig()


def test_waiting_for_batches_is_measured() -> None:
    """Time in the loader is waiting, also for the first batch of an epoch."""
    assert naps(MONITOR, data=SleepyLoader()) == [1, 0, 0]


def test_computing_is_measured() -> None:
    """Time in the batch processor is computing."""
    processor = SimpleBatchProcessor.from_callable(sleepy_forward)
    assert naps(MONITOR, batch_processor=processor) == [0, 1, 0]


@pytest.mark.parametrize(
    ("channel", "role", "inside", "outside"),
    [
        ("on_step", "before", [0, 0, 1], [1, 0, 0]),
        ("on_step", "after", [0, 0, 1], [0, 0, 1]),
        ("on_batch", "before", [0, 1, 0], [0, 0, 1]),
        ("on_batch", "after", [0, 1, 0], [0, 0, 1]),
        ("on_model_forward", "before", [0, 1, 0], [0, 1, 0]),
        ("on_model_backward", "after", [0, 1, 0], [0, 1, 0]),
        ("on_optimizer_step", "before", [0, 1, 0], [0, 0, 1]),
        ("on_epoch", "before", [1, 0, 0], [0, 0, 0]),
        ("on_epoch", "after", [0, 0, 0], [0, 0, 0]),
    ],
)
def test_hooks_are_measured(
    channel: ChannelName, role: str, inside: list[int], outside: list[int]
) -> None:
    """A sleeping hook is attributed by its position: inside or outside of the monitor."""
    hook = napping(channel, role)
    # With one step per epoch, each step includes the hooks of an epoch.
    data = make_loader(1 if channel == "on_epoch" else 2)
    epochs = 4 if channel == "on_epoch" else 2
    assert naps(MONITOR, hook, data=data, epochs=epochs) == inside
    assert naps(napping(channel, role), MONITOR, data=data, epochs=epochs) == outside


@pytest.mark.parametrize("kind", ["evaluate", "save", "log"])
def test_commit_points_are_excluded(kind: str, tmp_path: Path) -> None:
    """Evaluations, saves and logging points between steps do not count as waiting."""
    slow = SleepyCommit(kind, tmp_path / "slow.safetensors")
    assert naps(MONITOR, slow, data=make_loader(3)) == [0, 0, 0]


def test_samples_are_counted() -> None:
    """Samples/s are samples per step times steps/s, for uneven batches."""
    metrics = run_hook(MONITOR, data=make_loader(2, rest=1), epochs=1, log_every="1 epoch").metrics
    rate = metrics["perf/samples_per_s"][3] / metrics["perf/steps_per_s"][3]
    assert rate == pytest.approx((4 + 4 + 1) / 3)


def test_eta_is_published() -> None:
    """The ETA is the remaining steps times the mean step time; 0 at the end."""
    processor = SimpleBatchProcessor.from_callable(sleepy_forward)
    began_at = time.perf_counter()
    eta = run_hook(MONITOR, batch_processor=processor, steps=4).metrics["perf/eta_s"]
    taken = time.perf_counter() - began_at
    assert eta[4] == 0
    for step in (1, 2, 3):
        assert (4 - step) * NAP_S <= eta[step] < (4 - step) / step * taken


def test_eta_needs_a_known_length() -> None:
    """The ETA of data without a length starts after the first epoch."""
    began_at = time.perf_counter()
    eta = run_hook(MONITOR, data=SleepyLoader(), epochs=2).metrics["perf/eta_s"]
    taken = time.perf_counter() - began_at
    assert list(eta) == [2, 3, 4]
    assert NAP_S <= eta[3] < taken / 3
    assert eta[4] == 0


def test_memory_is_published() -> None:
    """Memory equals the system's number; a CPU has no device memory."""
    metrics = run_hook(MONITOR, steps=1).metrics
    assert metrics["perf/memory_mib"][1] == pytest.approx(
        psutil.Process().memory_info().rss / 2**20, rel=0.2
    )
    assert "perf/device_memory_mib" not in metrics


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_device_memory_is_published() -> None:
    """The peak of GPU tensors is published."""
    from accelerate import Accelerator

    from robo_orchard_lab.pipeline import HookBasedTrainer

    model = make_model()
    hooks = PipelineHooks("asks")
    records: list[Any] = []
    hooks.on_loop.before(lambda args: args.metrics.listen(records.append))
    hooks.register_at_commit(lambda args: args.requests.log("it is time"), "1 epoch")
    HookBasedTrainer(
        *(Accelerator(), model, make_loader(), SimpleBatchProcessor.from_callable(loss_of)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[hooks, MONITOR],
        max_epoch=1,
    )()
    metrics = {value.name: value.value for value in records[0].values}
    assert metrics["perf/device_memory_mib"] == torch.cuda.max_memory_allocated() / 2**20 > 0


def test_learning_rates_are_published() -> None:
    """Each parameter group has the learning rate of the next update."""

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        groups = [{"params": [first], "lr": 1e-3}, {"params": others, "lr": torch.tensor(0.5)}]
        return torch.optim.Adam(groups)

    lr_scheduler = partial(StepLR, step_size=2, gamma=0.5)
    metrics = run_hook(MONITOR, optimizer=two_groups, lr_scheduler=lr_scheduler, steps=4).metrics
    assert metrics["lr/group0"] == {1: 1e-3, 2: 5e-4, 3: 5e-4, 4: 2.5e-4}
    assert metrics["lr/group1"] == {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.125}


def test_no_learning_rate_without_updates() -> None:
    """A run without updates has times, but no learning rates and gradients."""
    processor = SimpleBatchProcessor.from_callable(loss_of, need_backward=False)
    metrics = run_hook(MONITOR, batch_processor=processor, steps=1).metrics
    assert list(metrics) == [
        *("perf/samples_per_s", "perf/steps_per_s", *TIMES, "perf/eta_s", "perf/memory_mib"),
    ]


class Norms(PipelineHooks):
    """Hook that records the gradient norm before each update."""

    def __init__(self) -> None:
        super().__init__("norms")
        self.of_step: dict[int, float] = {}
        self.on_step.after(self._note)

    def _note(self, args: PipelineHookArgs) -> None:
        if args.at_accumulation_boundary:
            gradients = [p.grad for p in args.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.of_step[args.progress.steps_done] = norm.item()


def test_gradient_norm_is_sampled() -> None:
    """The default norm is of the first update after each logging point."""
    norms = Norms()
    run = run_hook([MONITOR, norms], steps=14, accumulate=2, log_every="6 steps")
    assert run.metrics["grad_norm"] == {step: norms.of_step[step] for step in (2, 8, 14)}


def test_gradient_norm_of_every_update() -> None:
    """The norm on request is the mean over all updates."""
    norms = Norms()
    cfg = StatsMonitorConfig(grad_norm_every_update=True)
    run = run_hook([cfg, norms], steps=6, log_every="3 steps")
    means = {end: sum(norms.of_step[end - i] for i in range(3)) / 3 for end in (3, 6)}
    assert run.metrics["grad_norm"] == pytest.approx(means)


def test_gradient_norm_can_be_disabled() -> None:
    """The norm is neither computed nor published with grad_norm=False."""
    hooks = PipelineHooks("looks")
    found = []
    hooks.on_optimizer_step.after(lambda args: found.append(args.grad_norm))
    assert "grad_norm" not in run_hook([StatsMonitorConfig(grad_norm=False), hooks]).metrics
    assert found == [None] * 6


def test_computed_norm_is_reused() -> None:
    """A norm computed but not published by another hook is published."""
    hooks = PipelineHooks("computes")

    @hooks.on_optimizer_step.before
    def compute(args: PipelineHookArgs) -> None:
        args.grad_norm = torch.tensor(42.0)

    assert run_hook([hooks, MONITOR], steps=2).metrics["grad_norm"] == {1: 42.0, 2: 42.0}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_published_norm_is_not_changed(every: bool, first: bool) -> None:
    """The clipping hook, in either order, leaves grad_norm as without the monitor."""
    clipping, monitor = (
        GradientClippingHookConfig(max_norm=0.1),
        [StatsMonitorConfig(grad_norm_every_update=every)],
    )
    hooks = [*monitor, clipping] if first else [clipping, *monitor]
    both, alone = (run_hook(h, steps=6, log_every="3 steps").metrics for h in (hooks, clipping))
    assert both["grad_norm"] == alone["grad_norm"]


@pytest.mark.parametrize("every", [False, True])
def test_resumed_run_publishes_the_same_norms(every: bool) -> None:
    """Saved after any step, the run has the norms of the same updates."""
    cfg = StatsMonitorConfig(grad_norm_every_update=every)
    lr_scheduler = partial(StepLR, step_size=2, gamma=0.5)
    assert_state_round_trip(cfg, steps=7, log_every="3 steps", lr_scheduler=lr_scheduler)


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    with pytest.raises(StateError, match="StatsMonitor of version 1, found version 2"):
        StatsMonitorConfig()().load_state_dict({"version": 2})


def test_hook_can_request_logging_points() -> None:
    """A monitor with a trigger needs no other hook for logging points."""
    seen: list[int] = []
    notes = PipelineHooks("notes")

    @notes.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(lambda record: seen.append(record.global_step_id))

    trainer = make_trainer([StatsMonitorConfig(every="3 steps")(), notes], max_step=7)
    trainer()
    assert seen[:2] == [3, 6]
    assert "perf/steps_per_s" in trainer.metrics.names()


def test_invalid_fields_are_refused() -> None:
    """grad_norm_every_update needs grad_norm."""
    with pytest.raises(ValidationError, match="needs grad_norm=True"):
        StatsMonitorConfig(grad_norm=False, grad_norm_every_update=True)


def test_hook_does_not_affect_training() -> None:
    """The hook reads no tensors and changes no weights."""
    cfg = StatsMonitorConfig(grad_norm_every_update=True)
    assert_no_device_sync(cfg, log_every="3 steps")
    assert_weights_unchanged(cfg, accumulate=2)


def test_hook_unsubscribes_after_the_run() -> None:
    """After the run, the board does not call the monitor."""
    monitor = StatsMonitorConfig()()
    trainer = make_trainer(monitor, max_step=2)
    trainer()
    assert trainer.metrics.flush(log=True) is not None
    assert "perf/steps_per_s" not in trainer.metrics.names()
