"""Giving memory back by a schedule."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.clear_cache import ClearCacheHook, ClearCacheHookConfig
from robo_orchard_lab.pipeline.trigger import EverySteps, TriggerError
from robo_orchard_lab.testing import assert_state_round_trip, assert_weights_unchanged
from tiny import make_trainer


class Node:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


class Litter(PipelineHooks):
    """Drops such an object in each step, and writes down how many are alive at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[weakref.ref[Node]] = []
        self.alive: list[int] = []

        @self.on_step.before
        def litter(args: PipelineHookArgs) -> None:
            self.alive.append(sum(node() is not None for node in self.nodes))
            self.nodes.append(weakref.ref(Node()))


@pytest.fixture
def no_automatic_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_automatic_collection")
@pytest.mark.parametrize(
    ("every", "alive"),
    [
        ("3 steps", [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]),
        ("1 epoch", [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]),
        ("5 optimizer steps | 1 epoch", [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 0, 1, 2, 3]),
    ],
)
def test_garbage_goes_by_the_schedule(every: str, alive: list[int]) -> None:
    """With collect_garbage, unused objects are freed in the steps and epochs that it names."""
    litter = Litter()
    config = ClearCacheHookConfig(every=every, collect_garbage=True)
    make_trainer([config, litter], max_epoch=2)()
    assert litter.alive == alive


@pytest.mark.usefixtures("no_automatic_collection")
def test_garbage_stays_unless_asked_for() -> None:
    """By default the cache alone is emptied."""
    litter = Litter()
    make_trainer([ClearCacheHookConfig(every=EverySteps(1)), litter], max_epoch=1)()
    assert litter.alive == list(range(7))


@pytest.mark.usefixtures("no_automatic_collection")
def test_a_failing_step_is_left_alone() -> None:
    """After an error nothing is cleared, since the device may be what failed."""
    litter, failing = Litter(), PipelineHooks()

    @failing.on_step.after(when="at steps 3")
    def fail(args: PipelineHookArgs) -> None:
        raise RuntimeError("planted")

    config = ClearCacheHookConfig(every=EverySteps(3), collect_garbage=True)
    with pytest.raises(RuntimeError, match="planted"):
        make_trainer([litter, config, failing], max_epoch=1)()
    assert sum(node() is not None for node in litter.nodes) == 3


def test_training_is_the_same_without() -> None:
    """The weights are bit-identical to those of a run that clears nothing."""
    assert_weights_unchanged(ClearCacheHookConfig(every=EverySteps(2), collect_garbage=True))
    assert_state_round_trip(ClearCacheHookConfig(every=EverySteps(1)), stop_at=3)


def test_bad_schedules_are_refused() -> None:
    """A text that is no schedule is refused when the config is made, with what could stand."""
    with pytest.raises((ValueError, TriggerError), match="write '100 steps'"):
        ClearCacheHookConfig(every="often")
    config = ClearCacheHookConfig(every="2 epochs | 10 min")
    assert ClearCacheHookConfig.from_str(config.to_str("yaml"), "yaml") == config
    assert isinstance(config(), ClearCacheHook)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_device_gets_its_memory_back() -> None:
    """What PyTorch keeps of the GPU's memory is less after the hook than before."""
    reserved: list[int] = []
    watcher = PipelineHooks()

    @watcher.on_step.before
    def fill(args: PipelineHookArgs) -> None:
        reserved.append(torch.cuda.memory_reserved())
        torch.empty(2**28, dtype=torch.uint8, device="cuda")

    make_trainer([watcher, ClearCacheHookConfig(every=EverySteps(2))], max_step=3)()
    assert reserved[1] - reserved[0] >= 2**28
    assert reserved[2] < reserved[1]
