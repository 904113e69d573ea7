"""Errors of a rank: as others are told of them, and those that follow of another rank's."""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from robo_orchard_core.utils.hook import origin_of
from robo_orchard_lab.pipeline.distributed.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.errors import RankFailed, RankFailure

ErrorT = TypeVar("ErrorT", bound=BaseException)

KILLED = "Killed"
"""The type of failure of a process that is gone, or taken to be."""

_WORDS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "another process of the job",
)
_LONGEST_TEXT = 10_000
_LONGEST_CHAIN = 10
_FIRST = "__first_failure__"
_ELSEWHERE = "__failed_elsewhere__"


def failure_of(error: BaseException, rank: int) -> RankFailure:
    """What has failed, and where: the error of this rank, or the other one's that it follows of."""
    if isinstance(error, RankFailed):
        return error.failure
    first = getattr(error, _FIRST, None)
    if isinstance(first, RankFailure):
        return first
    return RankFailure(
        rank=rank,
        type=type(error).__qualname__,
        message=plain_text(error),
        hook=plain_text(origin_of(error) or "") or None,
        location=_location(error),
    )


def killed(rank: int, process: ProcessIdentity, or_else: str = "") -> RankFailure:
    """That a process is gone without a word, with what else may have become of it."""
    return RankFailure(
        rank=rank,
        type=KILLED,
        message=f"process {process.pid} on {process.host} is gone without a word: killed, or out "
        f"of memory{or_else and f', or {or_else}'}",
    )


def note_first(error: BaseException, first: RankFailure) -> None:
    """Have an error say which failure of another rank it follows of, and stay what it is."""
    with suppress(Exception):  # not every error takes notes
        error.add_note(str(first))
        setattr(error, _FIRST, first)


def plain_text(value: object) -> str:
    """A text that can be written, whatever an error says of itself."""
    try:
        text = str(value)
    except Exception as failure:
        text = f"<no text: {type(failure).__qualname__}>"
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


def _location(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return plain_text(f"{frames[-1].filename}:{frames[-1].lineno}") if frames else None


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
