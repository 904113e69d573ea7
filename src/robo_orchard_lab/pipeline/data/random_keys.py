"""Seeds that follow from what they are for."""

from __future__ import annotations

from enum import IntEnum
from hashlib import blake2b

import numpy as np
import torch

from robo_orchard_lab.pipeline.data.python_stream import PythonStream

_python = PythonStream()


class Purpose(IntEnum):
    """What is drawn from a stream."""

    ORDER = 0
    LOADING = 1
    COLLATING = 2
    WORKERS = 3


def epoch_key(seed: int, epoch_id: int, purpose: Purpose) -> int:
    """64 bits that belong to an epoch of a seed; those of others have nothing to do with them."""
    text = f"{seed}/{epoch_id}/{int(purpose)}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def numbered_seed(key: int, number: int) -> int:
    """The seed of one batch or sample of an epoch.

    Those of 2**32 neighbours differ also in their lower 32 bits, all that torch uses on a CPU.
    """
    return (key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF


def seed_streams(seed: int) -> None:
    """Have torch (CPU), NumPy and Python draw from the streams of a seed, which takes 4 us."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 90 us
    # The same seed would give all of them the same numbers.
    np.random.seed((seed ^ 0x5DEECE66) & 0xFFFFFFFF)
    _python.seed((seed ^ 0xC2B2AE35) & 0xFFFFFFFF)


def keyed_generator(seed: int, epoch_id: int, purpose: Purpose) -> torch.Generator:
    """A new generator of an epoch."""
    return torch.Generator().manual_seed(epoch_key(seed, epoch_id, purpose))
