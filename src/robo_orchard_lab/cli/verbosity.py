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
        help="Least level of log lines; by default info, in a terminal without routine lines, such "
        "as those of saves.",
    )
    @functools.wraps(command)
    def run(*args: Any, verbose: bool, quiet: bool, log_level: str | None, **others: Any) -> Any:
        if verbose and quiet:
            raise CommandError("expected one of --verbose and --quiet, found both")
        with _logging_as(verbose, quiet, log_level):
            return command(*args, is_quiet=quiet, **others)

    return run


@contextmanager
def _logging_as(verbose: bool, quiet: bool, log_level: str | None) -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger(_PACKAGE)
    before = root.level, package.level
    handlers = [each for each in root.handlers if isinstance(each, StderrHandler)]
    hides_routine = is_watched() and not verbose and log_level is None
    if verbose:
        package.setLevel(logging.DEBUG)
    if quiet:
        package.setLevel(logging.WARNING)
        root.setLevel(logging.WARNING)
    if log_level is not None:
        root.setLevel(log_level.upper())
    for handler in handlers if hides_routine else ():
        handler.addFilter(_is_no_routine)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_no_routine)
        root.setLevel(before[0])
        package.setLevel(before[1])


def _is_no_routine(record: logging.LogRecord) -> bool:
    return not getattr(record, "is_routine", False)  # of pipeline.job_log.ROUTINE
