"""Log lines of what the processes of a job do together: one for each event, not for each rank."""

from __future__ import annotations

import logging
import os

import torch.distributed


class JobLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes on the first rank, and nothing on others, whatever handlers there are.

    What a rank finds by itself goes to a logger of ``logging``.
    """

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - as in logging
        """Whether a record of this level is written here."""
        return is_first_rank() and super().isEnabledFor(level)


def job_logger(name: str) -> JobLogger:
    """The logger of a module for what is alike on all ranks.

    >>> logger = job_logger("robo_orchard_lab.pipeline")
    >>> logger.info("saved %s", "step_00000100")
    """
    return JobLogger(logging.getLogger(name), {})


def is_first_rank() -> bool:
    """Whether this process is the job's first, or the only one.

    As ``torch.distributed`` knows it, or else as the launcher says in RANK and WORLD_SIZE.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return not several or os.environ.get("RANK", "0") == "0"
