"""Errors that follow of another process's end."""

from __future__ import annotations

import torch.distributed as dist

_WORDS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "another process of the job",
)
_LONGEST_CHAIN = 10


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an exchange between the processes has failed, as it does when one of them is gone.

    The errors of torch say so by their text alone.
    """
    chain: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if chain is None:
            break
        if isinstance(chain, dist.DistError):
            return True
        if isinstance(chain, RuntimeError | ValueError | OSError):
            text = str(chain).lower()
            if any(word in text for word in _WORDS):
                return True
        chain = chain.__cause__
    return False
