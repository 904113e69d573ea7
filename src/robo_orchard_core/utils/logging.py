"""Log lines that say which process wrote them."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

DEFAULT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is when a record comes.

    A progress bar that redirects ``sys.stderr`` for a while so gets the lines above it, and one
    that has ended gets none.
    """

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        # Not StreamHandler's, which keeps the stream of now.
        logging.Handler.__init__(self, level)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute in the base class
        """The current ``sys.stderr``."""
        return sys.stderr


class VisibleFormatter(logging.Formatter):
    """Writes escapes for what a terminal would obey or hide; lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = super().format(record)
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def log_basic_config(
    level: int | str = logging.INFO,
    format: str | None = None,  # noqa: A002 - as in logging.basicConfig
    *,
    datefmt: str | None = None,
    all_ranks: bool = False,
    force: bool = False,
) -> None:
    """Log to standard error, like `logging.basicConfig`, with the rank in a run of several.

    What a terminal would obey instead of showing it, such as in a name that came with a file, is
    written with escapes.

    The rank is what the launcher (torchrun, accelerate) put into RANK and WORLD_SIZE. Nothing
    happens where the root logger has a handler already, unless ``force`` replaces it.

    Args:
        level: Of the root logger.
        format: In the %-style of `logging`; may use ``%(rank)d`` and ``%(world_size)d``.
            Default: time, level, logger, message, behind ``[rank 1/4]`` when WORLD_SIZE > 1.
        datefmt: As in `logging.basicConfig`.
        all_ranks: Write every record on ranks other than 0 too; they write warnings and above
            otherwise.
        force: Remove and close the handlers that the root logger has.
    """
    rank, world_size = _environment_number("RANK", 0), _environment_number("WORLD_SIZE", 1)
    if format is None:
        format = DEFAULT_FORMAT  # noqa: A001 - as in logging.basicConfig
        if world_size > 1:
            format = f"[rank {rank}/{world_size}] {format}"  # noqa: A001 - as above
    handler = StderrHandler()
    if rank > 0 and not all_ranks:
        handler.setLevel(logging.WARNING)
    defaults = {"rank": rank, "world_size": world_size}
    handler.setFormatter(VisibleFormatter(format, datefmt, defaults=defaults))
    logging.basicConfig(level=level, handlers=[handler], force=force)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
