"""What hooks ask of the trainer, which decides at the next commit point."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One thing asked for, with who asked and why."""

    reason: str
    by: str


class Requests:
    """Where hooks ask; nothing happens before the commit point.

    In a job of several processes a request is made alike on every rank: the trainer does not
    compare them across ranks.
    """

    __slots__ = ("stop_request",)

    def __init__(self) -> None:
        self.stop_request: Request | None = None
        """The first request to stop, or None."""

    def stop(self, reason: str, by: str | None = None) -> None:
        """Ask for the run to end at the next commit point; the first request is the one told.

        Args:
            reason: why, for the log.
            by: who asks; by default the calling function with its file and line.
        """
        if self.stop_request is None:
            self.stop_request = Request(reason, by or _caller())


def _caller() -> str:
    """The function that called the function that calls this one, with file and line."""
    frame = sys._getframe(2)
    file = os.path.basename(frame.f_code.co_filename)
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
