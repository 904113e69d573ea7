"""An error, as it is told to others."""

from __future__ import annotations

import traceback
from contextlib import suppress

from robo_orchard_core.utils.hook import origin_of
from robo_orchard_lab.pipeline.errors import RankFailed, RankFailure

_FIRST = "__first_failure__"
_LONGEST_TEXT = 10_000


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
