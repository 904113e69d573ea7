"""Runs that leave no trace in the process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """A fresh random state and a fresh Accelerate; then the caller's again, whatever happens.

    Put back are the random states of torch, NumPy and Python, what Accelerate keeps for the whole
    process, and the environment variables.
    """
    random_state = capture_random_state()
    environment = dict(os.environ)
    shared: list[dict[str, Any]] = [
        kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)
    ]
    kept = [dict(state) for state in shared]
    try:
        # In place, since objects of the caller may hold these very dicts.
        for state in shared:
            state.clear()
        seed_all(seed)
        yield
    finally:
        for state, values in zip(shared, kept, strict=True):
            state.clear()
            state.update(values)
        os.environ.clear()
        os.environ.update(environment)
        restore_random_state(random_state)


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
