"""Errors that follow of another process's end."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

ErrorT = TypeVar("ErrorT", bound=BaseException)

_WORDS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "another process of the job",
)
_LONGEST_CHAIN = 10
_ELSEWHERE = "__failed_elsewhere__"


def failed_elsewhere(error: ErrorT) -> ErrorT:
    """Mark an error that is raised here for what another process has told that it failed at."""
    setattr(error, _ELSEWHERE, True)
    return error


def is_failed_elsewhere(error: BaseException) -> bool:
    """Whether an error is marked by :func:`failed_elsewhere`."""
    return getattr(error, _ELSEWHERE, False) is True


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an exchange between the processes has failed, as it does when one of them is gone,
    or has told of an error.

    The errors of torch say so by their text alone.
    """
    chain: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if chain is None:
            break
        if isinstance(chain, dist.DistError) or is_failed_elsewhere(chain):
            return True
        if isinstance(chain, RuntimeError | ValueError | OSError):
            text = str(chain).lower()
            if any(word in text for word in _WORDS):
                return True
        chain = chain.__cause__
    return False
