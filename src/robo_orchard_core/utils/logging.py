"""Logging to standard error with the rank of the process."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TextIO

DEFAULT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FIELD = re.compile(r"%(%|\(\w+\)[-#0+ ]*[\d.*]*[a-zA-Z])")


class StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that looks up ``sys.stderr`` for each record.

    Log lines then appear above a progress bar that redirects ``sys.stderr`` for a while.
    """

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        # StreamHandler's constructor would store the current stream.
        logging.Handler.__init__(self, level)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute in the base class
        """Current ``sys.stderr``."""
        return sys.stderr


def visible(text: str, kept: str = "\n") -> str:
    r"""Return text with control and invisible characters escaped, except ``kept`` ones.

    >>> visible("\x1b[31mred\nnext")
    '\\x1b[31mred\nnext'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    r"""Return text on one line, with line ends escaped, too.

    >>> one_line("loss\n2026-01-01 INFO all is well")
    'loss\\n2026-01-01 INFO all is well'
    """
    return visible(str(text), "")


def aligned_lines(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return the lines of a table: the first ``left`` columns left-aligned, numbers right-aligned.

    >>> for line in aligned_lines([("module", "MiB"), ("head", "12.50")], left=1):
    ...     print(line)
    module    MiB
    head    12.50
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class VisibleFormatter(logging.Formatter):
    """Formatter with escaped control characters, except for newlines and tabs of messages.

    Line ends in arguments, such as names of metrics, can't make a line that looks like a record:
    they are escaped in strings, and the lines of other arguments are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        record, args = copy(record), record.args
        if isinstance(args, Mapping):
            record.args = {name: _argument(value) for name, value in args.items()}
        elif args:
            record.args = tuple(map(_argument, args))
        return visible(super().format(record), "\n\t")


def _argument(value: object) -> object:
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, (int, float)) or "\n" not in str(value):
        return value
    return str(value).replace("\n", "\n    ")


def log_basic_config(
    level: int | str = logging.INFO,
    format: str | None = None,  # noqa: A002 - as in logging.basicConfig
    *,
    datefmt: str | None = None,
    all_ranks: bool = False,
    force: bool = False,
) -> None:
    """Log to standard error, like `logging.basicConfig`, with the rank in a distributed job.

    The rank comes from the launcher's RANK and WORLD_SIZE (torchrun, accelerate). Control
    characters, for example in names read from a file, are escaped. If the root logger has a
    handler, the call has no effect without ``force``.

    Args:
        level: Level of the root logger.
        format: Format in %-style, with ``%(rank)d`` and ``%(world_size)d``. Default: time, level,
            logger and message, after ``[rank 1/4]`` if WORLD_SIZE > 1.
        datefmt: Date format, as in `logging.basicConfig`.
        all_ranks: Write all records on all ranks; else ranks above 0 write warnings and errors.
        force: Remove and close existing handlers of the root logger.

    Raises:
        ValueError: ``format`` has a ``%`` that begins no field.
    """
    rank, world_size = _environment_number("RANK", 0), _environment_number("WORLD_SIZE", 1)
    if format is None:
        format = DEFAULT_FORMAT  # noqa: A001 - as in logging.basicConfig
        if world_size > 1:
            format = f"[rank {rank}/{world_size}] {format}"  # noqa: A001 - as above
    elif "%" in (rest := _FIELD.sub("", format)):  # would print all fields of the record
        found = rest[rest.index("%") :][:20]
        raise ValueError(
            f"format: expected fields such as %(rank)d, found {found!r}; write %(name)s with the "
            "name of the field, or %% for a percent sign"
        )
    handler = StderrHandler()
    if rank > 0 and not all_ranks:
        handler.setLevel(logging.WARNING)
    defaults = {"rank": rank, "world_size": world_size}
    handler.setFormatter(VisibleFormatter(format, datefmt, defaults=defaults))
    logging.basicConfig(level=level, handlers=[handler], force=force)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
