"""Failures of ranks: root causes, and errors that follow from a failure on another rank."""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from robo_orchard_core.utils.hook import origin_of
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.errors import RankFailed, RankFailure

ErrorT = TypeVar("ErrorT", bound=BaseException)

KILLED = "Killed"
"""Failure type of a process that died."""

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
    """Return the root cause of an error: an error of this rank, or a failure of another rank."""
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


def killed_failure(rank: int, process: ProcessIdentity, or_else: str = "") -> RankFailure:
    """Return the failure of a process that died; ``or_else`` is a further possible reason."""
    return RankFailure(
        rank=rank,
        type=KILLED,
        message=process.describe_death() + (or_else and f", or {or_else}"),
    )


def attach_root_cause(error: BaseException, first: RankFailure) -> None:
    """Attach the root cause on another rank to an error, as a note."""
    with suppress(Exception):  # some errors refuse notes
        error.add_note(str(first))
        setattr(error, _FIRST, first)


def plain_text(value: object) -> str:
    """Return the text of a value, encodable and bounded; never raises."""
    try:
        text = str(value)
    except Exception as failure:
        text = f"<no text: {type(failure).__qualname__}>"
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


def _location(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return plain_text(f"{frames[-1].filename}:{frames[-1].lineno}") if frames else None


def mark_remote_failure(error: ErrorT) -> ErrorT:
    """Mark an error that this rank raises for a failure on another rank."""
    setattr(error, _ELSEWHERE, True)
    return error


def is_remote_failure(error: BaseException) -> bool:
    """Return True if :func:`mark_remote_failure` marked the error."""
    return getattr(error, _ELSEWHERE, False) is True


def is_broken_collective(error: BaseException) -> bool:
    """Return True if a collective failed because another process died or failed.

    Torch's errors are recognised by their text, since torch raises plain RuntimeErrors.
    """
    chain: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if chain is None:
            break
        if isinstance(chain, dist.DistError) or is_remote_failure(chain):
            return True
        if isinstance(chain, RuntimeError | ValueError | OSError):
            text = str(chain).lower()
            if any(word in text for word in _WORDS):
                return True
        chain = chain.__cause__
    return False
