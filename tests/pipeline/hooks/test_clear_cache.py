"""The cache-clearing hook."""

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
    """Object in a reference cycle, freed only by the garbage collector."""

    def __init__(self) -> None:
        self.itself = self


class Litter(PipelineHooks):
    """Hook that creates a cyclic object per step and records the live ones."""

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
def test_garbage_is_collected_on_trigger(every: str, alive: list[int]) -> None:
    """Unused objects are freed on each triggered step and epoch with collect_garbage."""
    litter = Litter()
    config = ClearCacheHookConfig(every=every, collect_garbage=True)
    make_trainer([config, litter], max_epoch=2)()
    assert litter.alive == alive


@pytest.mark.usefixtures("no_automatic_collection")
def test_garbage_is_kept_by_default() -> None:
    """Only the device cache is emptied by default."""
    litter = Litter()
    make_trainer([ClearCacheHookConfig(every=EverySteps(1)), litter], max_epoch=1)()
    assert litter.alive == list(range(7))


@pytest.mark.usefixtures("no_automatic_collection")
def test_cache_is_not_cleared_after_an_error() -> None:
    """After an error nothing is cleared, because the device may have failed."""
    litter, failing = Litter(), PipelineHooks()

    @failing.on_step.after(when="at steps 3")
    def fail(args: PipelineHookArgs) -> None:
        raise RuntimeError("planted")

    config = ClearCacheHookConfig(every=EverySteps(3), collect_garbage=True)
    with pytest.raises(RuntimeError, match="planted"):
        make_trainer([litter, config, failing], max_epoch=1)()
    assert sum(node() is not None for node in litter.nodes) == 3


def test_hook_does_not_change_training() -> None:
    """Weights are bit-identical with and without the hook."""
    assert_weights_unchanged(ClearCacheHookConfig(every=EverySteps(2), collect_garbage=True))
    assert_state_round_trip(ClearCacheHookConfig(every=EverySteps(1)), stop_at=3)


def test_invalid_trigger_is_refused() -> None:
    """An invalid trigger is refused with its alternatives when the config is built."""
    with pytest.raises((ValueError, TriggerError), match="write '100 steps'"):
        ClearCacheHookConfig(every="often")
    config = ClearCacheHookConfig(every="2 epochs | 10 min")
    assert ClearCacheHookConfig.from_str(config.to_str("yaml"), "yaml") == config
    assert isinstance(config(), ClearCacheHook)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_gpu_memory_is_released() -> None:
    """PyTorch reserves less GPU memory after the hook than before."""
    reserved: list[int] = []
    watcher = PipelineHooks()

    @watcher.on_step.before
    def fill(args: PipelineHookArgs) -> None:
        reserved.append(torch.cuda.memory_reserved())
        torch.empty(2**28, dtype=torch.uint8, device="cuda")

    make_trainer([watcher, ClearCacheHookConfig(every=EverySteps(2))], max_step=3)()
    assert reserved[1] - reserved[0] >= 2**28
    assert reserved[2] < reserved[1]
