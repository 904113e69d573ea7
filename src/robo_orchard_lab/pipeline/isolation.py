"""Contexts to restore a model's modes and buffers, and the process's RNGs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state
from robo_orchard_lab.pipeline.data.rng import (
    RandomGenerator,
    generator_states,
    set_generator_states,
)
from robo_orchard_lab.pipeline.metrics.exchange import pack_bytes, unpack_bytes
from robo_orchard_lab.pipeline.model import BufferSnapshot
from robo_orchard_lab.pipeline.sharding import reshard


@contextmanager
def evaluation_isolation(
    model: torch.nn.Module,
    shared_model: torch.nn.Module | None,
    generators: Mapping[str, RandomGenerator],
) -> Iterator[None]:
    """Run the body in evaluation mode without gradients; restore modes, buffers and RNGs.

    All ranks evaluate ``shared_model`` with the first rank's buffers: one collective if there are
    buffers. ``generators`` are restored in addition to the global RNGs.
    """
    with isolated_rng(generators), _first_rank_buffers(shared_model), _evaluation_mode(model):
        try:
            # Not inference_mode: compiled and sharded models keep tensors for training.
            with torch.no_grad():
                yield
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
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
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
def _first_rank_buffers(model: torch.nn.Module | None) -> Iterator[None]:
    """Use the first rank's buffers on all ranks: batch statistics differ between ranks."""
    buffers = [] if model is None else list(model.buffers())
    if model is None or not buffers:
        yield
        return
    snapshot = BufferSnapshot()
    snapshot.attach(model)
    snapshot.save()
    try:
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
