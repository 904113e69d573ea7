"""The random state of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import StateError


def capture_random_state() -> dict[str, Any]:
    """Where torch, NumPy and Python are in their streams.

    Of CUDA devices, it is that of the current one, which is this process's: reading those of all
    makes a context on each of them.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": _plain(np.random.get_state(legacy=True)),
        "python": random.getstate(),
    }


def keyed_random_state(key: str) -> dict[str, Any]:
    """A state such as :func:`capture_random_state` gives, at the beginning of streams of a key.

    Those of other keys have nothing to do with them.
    """
    digest = blake2b(key.encode(), digest_size=32).digest()
    seeds = [int.from_bytes(digest[begin : begin + 8], "little") for begin in range(0, 32, 8)]
    devices = ["cuda"] if torch.cuda.is_available() else []
    return {
        "torch": torch.Generator().manual_seed(seeds[0]).get_state(),
        "cuda": [torch.Generator(name).manual_seed(seeds[1]).get_state() for name in devices],
        "numpy": _plain(np.random.RandomState(seeds[2] & 0xFFFFFFFF).get_state(legacy=True)),
        "python": random.Random(seeds[3]).getstate(),
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


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's, as what can be saved."""
    name, keys, *rest = state
    return (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
