"""The random state of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import StateError


def capture_random_state() -> dict[str, Any]:
    """Where torch, NumPy and Python are in their streams.

    Of CUDA devices, it is that of the current one, which is this process's: reading those of all
    makes a context on each of them.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    keys = np.asarray(keys, dtype=np.int64)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(keys), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def check_random_state(state: Mapping[str, Any]) -> None:
    """Refuse a state of other devices than there are.

    Raises:
        StateError: the message says what was saved and what there is.
    """
    if bool(state["cuda"]) != torch.cuda.is_available():
        saved, here = ("with", "without") if state["cuda"] else ("without", "with")
        raise StateError(
            f"the run was saved {saved} a CUDA device and is resumed {here} one, which draws other "
            "random numbers; resume it on the same kind of device"
        )


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing from where :func:`capture_random_state` was called."""
    torch.set_rng_state(state["torch"])
    for of_device in state["cuda"]:
        torch.cuda.set_rng_state(of_device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
