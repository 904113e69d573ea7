"""Logger for events of the whole job, which only the first rank writes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

ROUTINE = {"is_routine": True}
"""``extra`` of a record that repeats what a terminal shows anyway, such as of a save. Commands show
such records in a log file, and in a terminal with ``--verbose``."""


class JobLogger(logging.LoggerAdapter[logging.Logger]):
    """Logger that writes on the first rank only. For rank-local events use ``logging``."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - as in logging
        """Return True if this rank writes records of the level."""
        return is_first_rank() and super().isEnabledFor(level)

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return message and arguments unchanged; the base class would drop ``extra``."""
        return msg, kwargs


def job_logger(name: str) -> JobLogger:
    """Return the logger of a module for events of the whole job.

    >>> logger = job_logger("robo_orchard_lab.pipeline")
    >>> logger.info("saved %s", "step_00000100")
    """
    return JobLogger(logging.getLogger(name), {})


def announce(
    logger: logging.Logger | JobLogger,
    text: object,
    *,
    is_routine: bool = False,
    has_time: bool = False,
) -> None:
    """Log a line at level INFO, or print the line to standard error if the log drops the level.

    So a script without logging shows the line. Nothing is printed if the level of the logger, or of
    a parent below the root, excludes INFO. On a full disk the line is lost.

    Args:
        logger: logger of the caller.
        text: the line; an object may have several lines, which the log indents.
        is_routine: mark the record as :data:`ROUTINE`.
        has_time: print the line with the time.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", text, extra=ROUTINE if is_routine else None)
    elif own_level(logger) <= logging.INFO and (
        is_first_rank() or not isinstance(logger, JobLogger)
    ):
        with suppress(OSError):
            at = time.strftime("%Y-%m-%d %H:%M:%S ") if has_time else ""
            print(f"{at}{text}", file=sys.stderr, flush=True)


def own_level(logger: logging.Logger | JobLogger) -> int:
    """Return the level of a logger or of its nearest parent with a level, without the root's.

    >>> own_level(logging.getLogger("some.module")) == logging.NOTSET
    True
    """
    found = logger.logger if isinstance(logger, JobLogger) else logger
    while found.parent is not None:
        if found.level:
            return found.level
        found = found.parent
    return logging.NOTSET


def is_first_rank() -> bool:
    """Return True on rank 0, from ``torch.distributed`` or the launcher's RANK and WORLD_SIZE."""
    dist = sys.modules.get("torch.distributed")  # a process without it has no process group
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return not several or os.environ.get("RANK", "0") == "0"
