"""Options ``-v``, ``-q`` and ``--log-level`` of commands that train."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from robo_orchard_core.utils.logging import StderrHandler
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.output import is_watched

_PACKAGE = "robo_orchard_lab"
_LEVELS = ("debug", "info", "warning", "error")


def verbosity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, and pass ``is_quiet``."""

    @click.option(
        "-v", "--verbose", is_flag=True, help="Show each epoch, each save, and who requested what."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
    @click.option(
        "--log-level",
        type=click.Choice(_LEVELS),
        help="Least level of log lines. `warning` is as --quiet, `debug` as --verbose with the "
        "lines of other packages; `info` adds the lines of saves in a terminal.",
    )
    @functools.wraps(command)
    def run(*args: Any, verbose: bool, quiet: bool, log_level: str | None, **others: Any) -> Any:
        given = {"--verbose": verbose, "--quiet": quiet, "--log-level": log_level}
        if len(names := [name for name, value in given.items() if value]) > 1:
            raise CommandError(f"expected one of these options, found {' and '.join(names)}")
        level = logging.WARNING if quiet else logging.DEBUG if verbose else None
        if log_level is not None:
            level = logging.getLevelNamesMapping()[log_level.upper()]
        with _logging_at(level, includes_others=not verbose):
            is_quiet = level is not None and level > logging.INFO
            return command(*args, is_quiet=is_quiet, **others)

    return run


@contextmanager
def _logging_at(level: int | None, *, includes_others: bool) -> Iterator[None]:
    """Set the levels of the log; hide routine records in a terminal without a level."""
    loggers = [logging.getLogger(_PACKAGE), *[logging.getLogger()] * includes_others]
    before = [logger.level for logger in loggers]
    handlers = [each for each in logging.root.handlers if isinstance(each, StderrHandler)]
    if level is not None:
        for logger in loggers:
            logger.setLevel(level)
    for handler in handlers if level is None and is_watched() else ():
        handler.addFilter(_is_no_routine)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_no_routine)
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


def _is_no_routine(record: logging.LogRecord) -> bool:
    return not getattr(record, "is_routine", False)  # of pipeline.job_log.ROUTINE
