"""What an evaluation leaves as it was: modes, buffers and random states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state
from robo_orchard_lab.pipeline.data.rng import (
    RandomGenerator,
    generator_states,
    set_generator_states,
)
from robo_orchard_lab.pipeline.model import BufferSnapshot


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """All of a model in evaluation mode; then each module in the mode that it was in."""
    modules = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        try:
            # A class that does more than note its mode (some merge weights) is told that it is
            # over; that may reach into the modules within, which come later and are told again.
            for module, training in modules:
                if module.training != training and type(module).train is not torch.nn.Module.train:
                    module.train(training)
        finally:
            for module, training in modules:
                module.training = training


@contextmanager
def isolated_rng(sources: Mapping[str, RandomGenerator]) -> Iterator[None]:
    """Draw what one likes, also from these; then go on as if nothing had been drawn."""
    state, states = capture_random_state(), generator_states(sources)
    try:
        yield
    finally:
        restore_random_state(state)
        set_generator_states(sources, states)


def seed_random_state(seed: int, stream: int) -> None:
    """Draw from the given one of a seed's streams, numbered from 0, in torch, NumPy and Python."""
    value = (seed * 0x9E3779B97F4A7C15 + stream) % 2**63  # spreads seeds; streams are neighbours
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
    np.random.seed(value % 2**32)
    random.seed(value)


@contextmanager
def first_rank_buffers(model: torch.nn.Module | None) -> Iterator[None]:
    """The buffers of the first rank in the models of all ranks; then their own again.

    Each rank's batch statistics are its own, with DDP between two of its broadcasts. Takes one
    collective where there are buffers; None is a model of one process, whose buffers stay.
    """
    buffers = [] if model is None else list(model.buffers())
    if model is None or not buffers:
        yield
        return
    own = BufferSnapshot()
    own.attach(model)
    own.save()
    try:
        with torch.no_grad():
            _broadcast(buffers)
        yield
    finally:
        own.restore()


def _broadcast(tensors: list[torch.Tensor]) -> None:
    """Those of the first rank, into the tensors of all; of all dtypes in one message."""
    device = tensors[0].device
    flat = [tensor.reshape(-1).contiguous().view(torch.uint8).to(device) for tensor in tensors]
    packed = torch.cat(flat)
    torch.distributed.broadcast(packed, src=0)  # a collective
    begin = 0
    for tensor, part in zip(tensors, flat, strict=True):
        end = begin + part.numel()
        # A copy, whose first byte lies where any dtype may begin.
        value = packed[begin:end].clone().view(tensor.dtype)
        tensor.copy_(value.reshape(tensor.shape))
        begin = end
