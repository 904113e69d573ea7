"""Tests of the assertions of the kit with correct hooks and planted faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import ChannelName, HookContext
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)


class Counting(PipelineHooks):
    """Counts steps and publishes the count; with a fault, if one is planted."""

    def __init__(self, fault: str = "") -> None:
        super().__init__("counting")
        self.fault = fault
        self.count = 0
        self.worst = torch.full((2,), float("nan"))
        self.register_hook("on_loop", HookContext.from_callable(before=self._begin))
        self.register_hook("on_step", HookContext.from_callable(after=self._count))

    def _begin(self, args: PipelineHookArgs) -> None:
        if self.fault == "asks at each start":
            args.requests.log("start", by=self.name)
        if self.fault == "publishes at each start":
            args.metrics.publish("starts", 1.0)

    def _count(self, args: PipelineHookArgs) -> None:
        self.count += 1
        args.metrics.publish("count", self.count, reduce="last")
        if self.count == 4:
            args.requests.log("four", by=self.name)

    def state_dict(self) -> dict[str, Any]:
        if self.fault == "saves what can't be saved":
            return {"count": {1, 2}}
        return {} if self.fault == "forgets" else {"count": self.count, "worst": self.worst}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.fault == "loads wrongly":
            self.count = state["count"] + 1
        elif self.fault != "forgets":
            self.count = state["count"]
            self.worst = state["worst"]


def test_a_complete_state_passes() -> None:
    """A complete state passes for a stop within an epoch, at its end, or within a window."""
    assert_state_round_trip(Counting)
    assert_state_round_trip(Counting, epochs=2, accumulate=3, log_every="3 steps", stop_at=[4, 5])
    assert_state_round_trip([Counting, GradientClippingHookConfig(max_norm=1.0)], stop_at=2)


def test_hooks_from_a_generator_are_in_every_run() -> None:
    """A generator of hooks is used for all runs, not only for the first."""
    with pytest.raises(AssertionError, match="the loaded state"):
        assert_state_round_trip(make for make in [partial(Counting, "loads wrongly")])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("forgets", r"stopped after step 1 .*\n  metric: count is 1.0 at step 2, expected is 2.0"),
        (
            "loads wrongly",
            r"after step 1 .*\n  the loaded state: counting\.count is 2, expected 1\n  metric: co",
        ),
        ("saves what can't be saved", "state after step 1 can't be saved and loaded: .*count"),
        (
            "asks at each start",
            r"request: log at step 1, requested by counting: start, "
            r"expected log at step 4, .*: four",
        ),
        (
            "publishes at each start",
            r"metric: starts is 1.0 at step 1, expected has no further value",
        ),
    ],
)
def test_an_incomplete_state_is_reported(fault: str, message: str) -> None:
    """The error has the step of the stop and the first differences."""
    with pytest.raises(AssertionError, match=message):
        assert_state_round_trip(partial(Counting, fault))


class Drifting(PipelineHooks):
    """Keeps to itself, and not in its state, how long to wait before it changes the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0
        self.register_hook("on_step", HookContext.from_callable(after=self._change))

    def _change(self, args: PipelineHookArgs) -> None:
        self.waited += 1
        if self.waited == 3:
            with torch.no_grad():
                args.model[0].bias.fill_(0.5)  # type: ignore[index]  # a Sequential


def test_different_weights_after_a_resume_are_reported() -> None:
    """The error has the first step with different weights."""
    with pytest.raises(
        AssertionError,
        match=r"stopped after step 2 .*\n  weights: after step 3, 0\.bias is .*, expected 0\.",
    ):
        assert_state_round_trip(Drifting, stop_at=2)


class Ending(PipelineHooks):
    """Keeps to itself after how many steps to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_hook("on_step", HookContext.from_callable(after=self._end))

    def _end(self, args: PipelineHookArgs) -> None:
        self.count += 1
        if self.count == 4:
            args.requests.stop("enough", by="Ending")


def test_a_different_end_after_a_resume_is_reported() -> None:
    """The error has the counters of both ends."""
    with pytest.raises(
        AssertionError,
        match=r"request: stop at step 6.*\n  the run ended at step 6 .*, expected step 4",
    ):
        assert_state_round_trip(Ending, stop_at=2)


def test_differences_are_ignored_by_pattern() -> None:
    """Patterns match names of metrics and paths in states."""
    with pytest.raises(AssertionError, match="the loaded state"):
        assert_state_round_trip(partial(Counting, "loads wrongly"), ignore=["count"], stop_at=4)
    assert_state_round_trip(
        partial(Counting, "loads wrongly"), ignore=["count", "counting.cou*"], stop_at=5
    )


@pytest.mark.parametrize("stop_at", [0, 6, [2, 9]])
def test_a_stop_outside_of_the_run_is_refused(stop_at: Any) -> None:
    """A stop must have a step before and after it."""
    with pytest.raises(ValueError, match="within the run, from 1 to 5, got"):
        assert_state_round_trip(Counting, stop_at=stop_at)
    with pytest.raises(ValueError, match="a run of 1 step can't be interrupted"):
        assert_state_round_trip(Counting, steps=1)


@pytest.mark.parametrize(
    "check", [assert_state_round_trip, assert_weights_unchanged, assert_no_device_sync]
)
def test_a_hook_object_is_refused(check: Any) -> None:
    """The error asks for a function that returns a new hook."""
    with pytest.raises(TypeError, match=r"'counting' runs several times.*lambda: Counting\("):
        check(Counting())


def acting(channel: ChannelName, act: Any, role: str = "after") -> PipelineHooks:
    """A bundle named ``acting`` with one function on one channel."""
    hooks = PipelineHooks("acting")
    hooks.register_hook(channel, HookContext.from_callable(**{role: act}))
    return hooks


def scale(args: PipelineHookArgs) -> None:
    if args.global_step_id == 2:
        with torch.no_grad():
            args.model[3].weight.mul_(2.0)  # type: ignore[index]  # a Sequential


def test_a_passive_hook_changes_no_weights() -> None:
    """Weights, buffers and counters are equal bit for bit."""
    assert_weights_unchanged(Counting, epochs=2, accumulate=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: acting("on_step", scale),
            r"^hook 'acting' changes the weights: after step 3, 3\.weight is .* of 16 elements",
        ),
        (
            lambda: acting("on_loop", scale_all, "before"),
            r"before the first step, 0\.weight is",
        ),
        (lambda: acting("on_epoch", scale_all), r"after step 4, 0\.weight is"),
        (
            lambda: acting("on_step", lambda args: torch.rand(())),
            r"after step 2, 0\.weight is .*global generator",
        ),
        (
            lambda: acting("on_step", lambda args: args.requests.stop("enough")),
            r"changes the run: it ended at step 1 .*, without the hook at step 6",
        ),
    ],
)
def test_changed_weights_are_reported(make: Any, message: str) -> None:
    """The error has the first step with a different weight, and its name."""
    with pytest.raises(AssertionError, match=message):
        assert_weights_unchanged(make)


def scale_all(args: PipelineHookArgs) -> None:
    with torch.no_grad():
        args.model[0].weight.mul_(2.0)  # type: ignore[index]  # a Sequential


class Reading(PipelineHooks):
    def __init__(self, what: str) -> None:
        super().__init__("reading")
        self.what = what
        self.register_hook("on_step", HookContext.from_callable(after=self._read), "2 steps")
        self.register_hook("on_loop", HookContext.from_callable(before=self._listen))

    def _read(self, args: PipelineHookArgs) -> None:
        assert args.loss is not None
        args.metrics.publish("x", args.loss)
        if self.what == "latest":
            args.metrics.latest("x")
        elif self.what == "item":
            self._deeper(args.loss)

    def _deeper(self, loss: torch.Tensor) -> None:
        loss.item()

    def _listen(self, args: PipelineHookArgs) -> None:
        if self.what == "collects":
            args.metrics.before_logging(lambda: self._deeper(torch.ones(())))


def test_publishing_and_requests_do_not_sync(tmp_path: Path) -> None:
    """The trainer reads published and requested values at the commit point."""
    assert_no_device_sync(partial(Reading, "nothing"))
    file = tmp_path / "weights.safetensors"
    assert_no_device_sync(
        lambda: acting("on_step", lambda args: args.requests.save_weights(file, "planted"))
    )
    assert file.is_file()
    assert_no_device_sync(GradientClippingHookConfig(max_norm=1.0), accumulate=2)


def test_reads_of_the_optimizer_are_not_counted() -> None:
    """AdamW reads its step count in a run without the hook as well."""
    optimizer = partial(torch.optim.AdamW, lr=0.1)
    assert_no_device_sync(partial(Reading, "nothing"), optimizer=optimizer)
    with pytest.raises(AssertionError, match="reads from tensors 3 times"):
        assert_no_device_sync(partial(Reading, "item"), optimizer=optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(Reading, "item"),
            r"hook 'reading' reads from tensors 3 times in 6 steps, expected at most 0;(.|\n)*"
            r"3 x item by hook 'reading' at test_assertions\.py:\d+ in Reading\._deeper, "
            r"called from test_assertions\.py:\d+ in Reading\._read",
        ),
        (
            partial(Reading, "latest"),
            r"1 x item by hook 'reading' at board\.py:\d+ in MetricsBoard\.latest, "
            r"called from test_assertions\.py:\d+ in Reading\._read",
        ),
        (partial(Reading, "collects"), r"6 x item by hook 'reading' at .* in Reading\._deeper"),
        (
            lambda: acting("on_step", lambda args: args.loss.tolist()),
            r"6 x tolist by hook 'acting' at test_assertions\.py:\d+ in .*<lambda>$",
        ),
    ],
)
def test_a_device_sync_is_reported(make: Any, message: str) -> None:
    """The error has each line that reads, its callers up to the hook, and the count."""
    with pytest.raises(AssertionError, match=message):
        assert_no_device_sync(make)


def test_an_allowed_number_of_reads_passes() -> None:
    """A hook with a trigger may read that often."""
    assert_no_device_sync(partial(Reading, "item"), allowed=3)
    with pytest.raises(AssertionError, match=r"reads from tensors 4 times .* at most 3"):
        assert_no_device_sync(partial(Reading, "item"), allowed=3, steps=8)


@pytest.mark.parametrize(("draw", "whose"), [(random.random, "Python"), (np.random.rand, "NumPy")])
def test_use_of_other_global_generators_is_reported(draw: Callable[[], object], whose: str) -> None:
    """A hook that draws from NumPy's or Python's RNG fails, though the weights do not change."""

    def drawing() -> PipelineHooks:
        hooks = PipelineHooks("draws")
        hooks.on_step.after(lambda args: draw())
        return hooks

    with pytest.raises(AssertionError, match=f"uses {whose}'s global random generator"):
        assert_weights_unchanged(drawing, steps=2)
