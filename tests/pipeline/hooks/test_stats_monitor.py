"""What a run's time goes into, and what else is measured of it."""

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

NAP_S = 0.04
"""Much longer than anything else in a step of the tiny model."""
TIMES = ("perf/data_s", "perf/compute_s", "perf/hooks_s")


def nap(*_: object) -> None:
    time.sleep(NAP_S)


def napping(channel: ChannelName, role: str) -> PipelineHooks:
    """A hook that sleeps once each time its channel is open."""
    hooks = PipelineHooks(f"naps {role} {channel}")
    getattr(getattr(hooks, channel), role)(nap)
    return hooks


def sleepy_forward(model: Any, batch: Any) -> Any:
    nap()
    return loss_of(model, batch)


class SleepyLoader:
    """Has each batch waited for, and no length."""

    def __iter__(self) -> Iterator[Any]:
        for batch in make_loader(2):
            nap()
            yield batch


class SleepyCommit(PipelineHooks):
    """Has something slow done at the commit point of each step."""

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
    """How many naps a step of the last window took of waiting, of computing and of hooks."""
    setting = {"data": make_loader(2), "epochs": 2, "log_every": "last", **setting}
    told = run_hook(hooks, **setting).metrics
    last = max(told["perf/data_s"])
    seconds = [told[name][last] for name in TIMES]
    for taken in seconds:
        assert taken % NAP_S < 0.7 * NAP_S  # a nap takes at least its time
    assert told["perf/steps_per_s"][last] == pytest.approx(1 / sum(seconds))
    return [math.floor(taken / NAP_S) for taken in seconds]


MONITOR = StatsMonitorConfig()


def test_waiting_for_batches_is_told() -> None:
    """What the loader takes is waiting, also for the first batch of an epoch."""
    assert naps(MONITOR, data=SleepyLoader()) == [1, 0, 0]


def test_computing_is_told() -> None:
    """What the batch processor takes is computing."""
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
def test_hooks_are_told(
    channel: ChannelName, role: str, inside: list[int], outside: list[int]
) -> None:
    """By where they are: one that sleeps, inside of the monitor and outside."""
    hook = napping(channel, role)
    # With one step to an epoch, each step has an epoch's hooks, too.
    data = make_loader(1 if channel == "on_epoch" else 2)
    epochs = 4 if channel == "on_epoch" else 2
    assert naps(MONITOR, hook, data=data, epochs=epochs) == inside
    assert naps(napping(channel, role), MONITOR, data=data, epochs=epochs) == outside


@pytest.mark.parametrize("kind", ["evaluate", "save", "log"])
def test_what_is_done_at_commit_points_is_left_out(kind: str, tmp_path: Path) -> None:
    """Evaluations, saves and logging points between two steps are no waiting for data."""
    slow = SleepyCommit(kind, tmp_path / "slow.safetensors")
    assert naps(MONITOR, slow, data=make_loader(3)) == [0, 0, 0]


def test_samples_are_counted() -> None:
    """The samples per second are those per step, by the steps per second, for uneven batches."""
    told = run_hook(MONITOR, data=make_loader(2, rest=1), epochs=1, log_every="1 epoch").metrics
    rate = told["perf/samples_per_s"][3] / told["perf/steps_per_s"][3]
    assert rate == pytest.approx((4 + 4 + 1) / 3)


def test_the_end_is_foreseen() -> None:
    """The time left is that of the steps left, by what a step took; in the end it is none."""
    processor = SimpleBatchProcessor.from_callable(sleepy_forward)
    eta = run_hook(MONITOR, batch_processor=processor, steps=4).metrics["perf/eta_s"]
    assert eta[4] == 0
    for step in (1, 2, 3):
        assert (4 - step) * NAP_S <= eta[step] < (4 - step) * 2 * NAP_S


def test_the_end_is_foreseen_when_the_length_is_known() -> None:
    """Of data without a length, from the end of the first epoch on."""
    eta = run_hook(MONITOR, data=SleepyLoader(), epochs=2).metrics["perf/eta_s"]
    assert list(eta) == [2, 3, 4]
    assert NAP_S <= eta[3] < 2 * NAP_S
    assert eta[4] == 0


def test_memory_is_told() -> None:
    """The process takes what the system says it takes; a CPU has no memory of its own."""
    told = run_hook(MONITOR, steps=1).metrics
    assert told["perf/memory_mib"][1] == pytest.approx(
        psutil.Process().memory_info().rss / 2**20, rel=0.2
    )
    assert "perf/device_memory_mib" not in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_device_memory_is_told() -> None:
    """The most that tensors have taken of the GPU."""
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
    told = {value.name: value.value for value in records[0].values}
    assert told["perf/device_memory_mib"] == torch.cuda.max_memory_allocated() / 2**20 > 0


def test_learning_rates_are_told() -> None:
    """Each parameter group has its own: at a logging point, that of the next update."""

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        groups = [{"params": [first], "lr": 1e-3}, {"params": others, "lr": torch.tensor(0.5)}]
        return torch.optim.Adam(groups)

    schedule = partial(StepLR, step_size=2, gamma=0.5)
    told = run_hook(MONITOR, optimizer=two_groups, lr_scheduler=schedule, steps=4).metrics
    assert told["lr/group0"] == {1: 1e-3, 2: 5e-4, 3: 5e-4, 4: 2.5e-4}
    assert told["lr/group1"] == {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.125}


def test_without_an_update_there_is_no_rate() -> None:
    """A run that only goes forward has times, and neither learning rates nor gradients."""
    processor = SimpleBatchProcessor.from_callable(loss_of, need_backward=False)
    told = run_hook(MONITOR, batch_processor=processor, steps=1).metrics
    assert list(told) == [
        *("perf/samples_per_s", "perf/steps_per_s", *TIMES, "perf/eta_s", "perf/memory_mib"),
    ]


class Norms(PipelineHooks):
    """Writes down the norm of all gradients ahead of each update."""

    def __init__(self) -> None:
        super().__init__("norms")
        self.of_step: dict[int, float] = {}
        self.on_step.after(self._note)

    def _note(self, args: PipelineHookArgs) -> None:
        if args.at_accumulation_boundary:
            gradients = [p.grad for p in args.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.of_step[args.progress.steps_done] = norm.item()


def test_the_gradient_norm_is_sampled() -> None:
    """By default it is that of the first update after each logging point, as it was there."""
    norms = Norms()
    run = run_hook([MONITOR, norms], steps=14, accumulate=2, log_every="6 steps")
    assert run.metrics["grad_norm"] == {step: norms.of_step[step] for step in (2, 8, 14)}


def test_the_gradient_norm_of_every_update() -> None:
    """On request it is the mean over all updates."""
    norms = Norms()
    cfg = StatsMonitorConfig(grad_norm_every_update=True)
    run = run_hook([cfg, norms], steps=6, log_every="3 steps")
    means = {end: sum(norms.of_step[end - i] for i in range(3)) / 3 for end in (3, 6)}
    assert run.metrics["grad_norm"] == pytest.approx(means)


def test_the_gradient_norm_may_be_left_alone() -> None:
    """Without grad_norm it is neither computed nor published."""
    hooks = PipelineHooks("looks")
    found = []
    hooks.on_optimizer_step.after(lambda args: found.append(args.grad_norm))
    assert "grad_norm" not in run_hook([StatsMonitorConfig(grad_norm=False), hooks]).metrics
    assert found == [None] * 6


def test_a_norm_that_is_there_is_taken() -> None:
    """Where another hook has computed it and does not publish it, this one publishes that."""
    hooks = PipelineHooks("computes")

    @hooks.on_optimizer_step.before
    def compute(args: PipelineHookArgs) -> None:
        args.grad_norm = torch.tensor(42.0)

    assert run_hook([hooks, MONITOR], steps=2).metrics["grad_norm"] == {1: 42.0, 2: 42.0}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_norm_that_is_published_is_left_alone(every: bool, first: bool) -> None:
    """Beside the clipping hook, in either order, grad_norm is as it is without the monitor."""
    clipping, monitor = (
        GradientClippingHookConfig(max_norm=0.1),
        [StatsMonitorConfig(grad_norm_every_update=every)],
    )
    hooks = [*monitor, clipping] if first else [clipping, *monitor]
    both, alone = (run_hook(h, steps=6, log_every="3 steps").metrics for h in (hooks, clipping))
    assert both["grad_norm"] == alone["grad_norm"]


@pytest.mark.parametrize("every", [False, True])
def test_a_resumed_run_publishes_what_the_straight_one_does(every: bool) -> None:
    """But for times and memory; saved after any step, it has the norms of the same updates."""
    cfg = StatsMonitorConfig(grad_norm_every_update=every)
    schedule = partial(StepLR, step_size=2, gamma=0.5)
    assert_state_round_trip(cfg, steps=7, log_every="3 steps", lr_scheduler=schedule)


def test_a_state_of_another_version_is_refused() -> None:
    """The error names the hook and the versions."""
    with pytest.raises(StateError, match="StatsMonitor of version 1, found version 2"):
        StatsMonitorConfig()().load_state_dict({"version": 2})


def test_it_makes_logging_points_of_its_own() -> None:
    """By its schedule, so that it needs no other hook to publish what it has measured."""
    seen: list[int] = []
    notes = PipelineHooks("notes")

    @notes.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(lambda record: seen.append(record.global_step_id))

    trainer = make_trainer([StatsMonitorConfig(every="3 steps")(), notes], max_step=7)
    trainer()
    assert seen[:2] == [3, 6]
    assert "perf/steps_per_s" in trainer.metrics.names()


def test_wrong_fields_are_refused() -> None:
    """The norm of every update is one that is published."""
    with pytest.raises(ValidationError, match="needs grad_norm=True"):
        StatsMonitorConfig(grad_norm=False, grad_norm_every_update=True)


def test_it_watches_without_a_trace() -> None:
    """It reads nothing from the device, and the weights are those of a run without it."""
    cfg = StatsMonitorConfig(grad_norm_every_update=True)
    assert_no_device_sync(cfg, log_every="3 steps")
    assert_weights_unchanged(cfg, accumulate=2)


def test_a_run_that_is_over_has_no_more_to_tell() -> None:
    """After the run, the board calls the monitor no more."""
    monitor = StatsMonitorConfig()()
    trainer = make_trainer(monitor, max_step=2)
    trainer()
    assert trainer.metrics.flush(log=True) is not None
    assert "perf/steps_per_s" not in trainer.metrics.names()
