"""Contexts to restore a model's modes and buffers, and the process's RNGs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state
from robo_orchard_lab.pipeline.data.random_generators import (
    RandomGenerator,
    generator_states,
    set_generator_states,
)
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.metrics.exchange import pack_bytes, unpack_bytes
from robo_orchard_lab.pipeline.model import BufferSnapshot, ModuleOfDDP, ddp_of
from robo_orchard_lab.pipeline.sharding import is_sharded_model, reshard


@contextmanager
def isolated_evaluation(
    model: torch.nn.Module,
    generators: Mapping[str, RandomGenerator] | None = None,
    *,
    processes: int = 1,
    is_shared: bool = True,
) -> Iterator[Any]:
    """Run the body in evaluation mode without gradients; restore modes, buffers and RNGs.

    Yields the model for forward passes: of a DDP model the module, without communication, since
    ranks may have different numbers of batches. The body of a sharded model communicates.

    Args:
        model: prepared or not.
        generators: restored in addition to the global RNGs.
        processes: number of ranks that evaluate together.
        is_shared: all ranks enter; with several ranks, the model has the first rank's buffers, by
            one collective if there are buffers.

    Raises:
        PipelineStateError: a sharded model that is not shared.
    """
    ddp, is_sharded = ddp_of(model), is_sharded_model(model)
    if is_sharded and not is_shared:
        raise PipelineStateError(
            "rank_local=True: the forward pass of a sharded model is a collective; enter on all "
            "ranks, without rank_local"
        )
    unwrapped = model if ddp is None else ddp.module
    broadcasts = is_shared and (processes > 1 or ddp is not None or is_sharded)
    with isolated_rng(generators or {}), _kept_buffers(unwrapped, broadcasts), _modes(model):
        try:
            # Not inference_mode: compiled and sharded models keep tensors for training.
            with torch.no_grad():
                yield model if ddp is None else ModuleOfDDP(ddp, runs_hooks=False)
        finally:
            reshard(model)


@contextmanager
def isolated_rng(generators: Mapping[str, RandomGenerator]) -> Iterator[None]:
    """Restore the global RNGs, including the current CUDA device's, and ``generators``."""
    state, states = capture_random_state(), generator_states(generators)
    try:
        yield
    finally:
        restore_random_state(state)
        set_generator_states(generators, states)


@contextmanager
def _modes(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        try:
            # An overridden train() may do more, such as merge weights, and may change modules
            # within, which follow in the list.
            for module, training in modes:
                if module.training != training and type(module).train is not torch.nn.Module.train:
                    module.train(training)
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _kept_buffers(model: torch.nn.Module, broadcasts: bool) -> Iterator[None]:
    """Restore the buffers; ``broadcasts`` uses those of the first rank on all ranks.

    Batch statistics differ between ranks.
    """
    snapshot = BufferSnapshot()
    snapshot.attach(model)
    snapshot.save()
    try:
        buffers = list(model.buffers())
        if broadcasts and buffers:
            with torch.no_grad():
                _broadcast(buffers)
        yield
    finally:
        snapshot.restore()


def _broadcast(tensors: list[torch.Tensor]) -> None:
    """Overwrite tensors of any dtypes with the first rank's: one collective."""
    packed = pack_bytes(tensors, tensors[0].device)
    torch.distributed.broadcast(packed, src=0)  # a collective
    received = unpack_bytes(packed, [(tensor.dtype, tensor.shape) for tensor in tensors])
    for tensor, values in zip(tensors, received, strict=True):
        tensor.copy_(values)
