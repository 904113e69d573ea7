"""A progress bar that redraws itself at the bottom of a terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any

import rich
from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from robo_orchard_lab.pipeline.hooks.run_view import RunStatus

_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_GAP = "  "


def find_terminal() -> Console | None:
    """The console to draw on, or None where nothing can be redrawn.

    That is the one of standard output, which rich's own log handler shares, or that of standard
    error if only this is a terminal. Where someone draws a live display already, there is none.
    """
    if isinstance(sys.stdout, FileProxy) or isinstance(sys.stderr, FileProxy):
        return None
    for stream, console in (
        (sys.stdout, rich.get_console()),
        (sys.stderr, Console(stderr=True)),
    ):
        # Asked of the stream as well: FORCE_COLOR makes a terminal of any file to the console.
        if stream.isatty() and console.is_interactive and not console.is_dumb_terminal:
            return console
    return None


class TerminalBar:
    """The bar, from :meth:`open` to :meth:`close`; what is printed or logged goes above it.

    Nothing here raises when the terminal goes away: it is drawn on no more.
    """

    refresh_seconds = 0.5
    quick_refresh_seconds = 0.05  # a redraw takes about 1 ms, and so may an epoch
    redraws = True

    def __init__(self, console: Console) -> None:
        # Without a thread of its own, which would take time from the training at its own rate.
        self._live = Live(
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self, status: RunStatus) -> None:
        """Start to draw."""
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        with suppress(OSError):
            self._live.start()
            self._live.update(_Picture(status), refresh=True)
        for handler in _stream_handlers():
            if id(handler.stream) in streams:  # kept from before they were redirected
                self._redirected.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[id(handler.stream)]))

    def show(self, status: RunStatus) -> None:
        """Draw anew."""
        with suppress(OSError):
            self._live.update(_Picture(status), refresh=True)

    def close(self, status: RunStatus | None) -> None:
        """Leave the last state standing and give the terminal back."""
        try:
            with suppress(OSError):
                sys.stdout.flush()  # half a line that is still to be printed
                sys.stderr.flush()
            if status is not None:
                self.show(status)
        finally:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._redirected = []
            with suppress(OSError):
                self._live.stop()


class _Picture:
    """A status with a bar on its first line; what does not fit beside the bar stands below."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status = self._status
        position = _GAP.join(status.position)
        figures, metrics = [*status.measurements[:1], *status.pace], status.measurements[1:]
        layouts: list[tuple[list[str], list[list[str]]]] = [  # beside the bar, and the lines below
            ([*status.measurements, *status.pace], []),
            (figures, [metrics]),
            ([], [figures, metrics]),
        ]
        for beside, below in layouts:  # noqa: B007 - the first that fits, or else the last
            room = options.max_width - len(_GAP.join([position, "", *beside]))
            if room >= _MIN_BAR_WIDTH:
                break
        grid = Table.grid(padding=(0, len(_GAP), 0, 0))
        bar = ProgressBar(
            total=status.total_steps,
            completed=status.steps,
            width=max(1, min(room, _MAX_BAR_WIDTH)),
            complete_style="bar.finished" if status.outcome == "finished" else "cyan",
            pulse=status.total_steps is None and status.outcome == "running",
        )
        grid.add_row(_text([position]), bar, *([_text(beside)] if beside else []))
        yield grid
        for parts in below:
            for line in _filled(parts, options.max_width):
                yield _text(line)


def _filled(parts: list[str], width: int) -> list[list[str]]:
    """The parts on as few lines as they take."""
    lines: list[list[str]] = []
    for part in parts:
        if lines and len(_GAP.join([*lines[-1], part])) <= width:
            lines[-1].append(part)
        else:
            lines.append([part])
    return lines


def _text(parts: list[str]) -> Text:
    return Text(_GAP.join(parts), no_wrap=True, overflow="ellipsis")


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
    ]
