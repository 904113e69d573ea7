"""Logger for events of the whole job, which only the first rank writes."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

import torch.distributed


class JobLogger(logging.LoggerAdapter[logging.Logger]):
    """Logger that writes on the first rank only. For rank-local events use ``logging``."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - as in logging
        """Return True if this rank writes records of the level."""
        return is_first_rank() and super().isEnabledFor(level)


def job_logger(name: str) -> JobLogger:
    """Return the logger of a module for events of the whole job.

    >>> logger = job_logger("robo_orchard_lab.pipeline")
    >>> logger.info("saved %s", "step_00000100")
    """
    return JobLogger(logging.getLogger(name), {})


def announce(logger: logging.Logger | JobLogger, text: str) -> None:
    """Log a line at level INFO, or print the line to standard error if the log drops the level.

    So a script without logging shows the line. On a full disk the line is lost.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", text)
    elif is_first_rank() or not isinstance(logger, JobLogger):
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    """Return True on rank 0, from ``torch.distributed`` or the launcher's RANK and WORLD_SIZE."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return not several or os.environ.get("RANK", "0") == "0"
