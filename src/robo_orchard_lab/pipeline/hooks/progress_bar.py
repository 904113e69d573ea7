"""Hook that shows the progress of a run: a bar in a terminal, log lines elsewhere.

rich is optional and costs 50 ms to import, so only functions for the terminal import it.
"""

from __future__ import annotations

import logging
import random
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.run_view import Display, RunStatus, RunView

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

logger = logging.getLogger(__name__)

_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_GAP = "  "


class ProgressBarHook(PipelineHooks):
    """Progress bar in a terminal, log lines elsewhere: epoch, step, loss, samples/s, ETA.

    Register the hook first: then the end of an epoch includes values measured by other hooks. The
    bar needs rich (``pip install "robo-orchard-hooks[terminal]"``); without rich there are lines.

    With a hook that logs metrics (``MetricsLogger``), loss (``loss/total``) and metrics are those
    of the last logging point, without a device sync. Otherwise the loss is this rank's latest one,
    and loss and metrics are read when shown: every ``refresh_seconds``, at the end of an epoch and
    at the end; each is a device sync.

    Samples/s are of all ranks, over the last 10 s; at the end, over the complete loop.

    - Ranks: the main process shows the progress. On all ranks, a metric in ``metrics`` without a
      publisher is an error at the end of the run.
    - State: none.
    """

    keeps_trajectory = True

    def __init__(self, cfg: ProgressBarHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._view: RunView | None = None
        self._expected: list[RemovableHandle] = []
        self.register_hook("on_loop", HookContext.from_callable(self._open, self._close))
        self.register_hook(
            "on_epoch", HookContext.from_callable(self._begin_epoch, self._finish_epoch)
        )
        self.on_step.after(self._finish_step)

    def _open(self, args: PipelineHookArgs) -> None:
        # On every rank, so that all ranks fail together if a metric has no publisher.
        self._expected = [args.metrics.expect(name, self.name) for name in self.cfg.metrics]
        if args.accelerator.is_main_process:
            display = _choose_display(self.cfg.plain)
            self._view = RunView(self.cfg.metrics, self.cfg.refresh_seconds, args, display)

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        if self._view is not None:
            self._view.begin_epoch()

    def _finish_step(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_step(args)

    def _finish_epoch(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_epoch(args)

    def _close(self, args: PipelineHookArgs) -> None:
        for handle in self._expected:
            handle.remove()
        view, self._view = self._view, None
        if view is not None:
            view.close(args)


class ProgressBarHookConfig(PipelineHooksConfig[ProgressBarHook]):
    """Metrics to show, and refresh interval.

    >>> ProgressBarHookConfig(metrics=["grad_norm"])().name
    'ProgressBarHook'
    """

    class_type: type[ProgressBarHook] = ProgressBarHook
    metrics: list[str] = Field(default=[], description="Metric names to show after the loss.")
    refresh_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Least time between two updates, in seconds; None for 0.5 (bar) or 10 (lines).",
    )
    plain: bool = Field(
        default=False, description="Write lines to a terminal, too, for example under a debugger."
    )


class _LogLines:
    """Display in the log, or on standard error if the log drops INFO records."""

    refresh_seconds = 10.0
    quick_refresh_seconds = 0.0  # each epoch has a line
    redraws = False

    def open(self, status: RunStatus) -> None:
        """Show nothing yet."""

    def show(self, status: RunStatus) -> None:
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info("%s", status)
        else:
            print(status, file=sys.stderr, flush=True)

    def close(self, status: RunStatus | None) -> None:
        if status is not None:
            self.show(status)


class _TerminalBar:
    """Bar at the bottom of a terminal; other output appears above the bar.

    A terminal that disappears is not an error; drawing stops.
    """

    refresh_seconds = 0.5
    quick_refresh_seconds = 0.05  # a redraw costs about 1 ms; an epoch may be as short
    redraws = True

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._live = Live(
            console=console,
            auto_refresh=False,  # a refresh thread would take time from training
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self, status: RunStatus) -> None:
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        with suppress(OSError):
            self._live.start()
            self._live.update(_Picture(status), refresh=True)
        for handler in _stream_handlers():
            if id(handler.stream) in streams:  # created before rich redirected the streams
                self._redirected.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[id(handler.stream)]))

    def show(self, status: RunStatus) -> None:
        with suppress(OSError):
            self._live.update(_Picture(status), refresh=True)

    def close(self, status: RunStatus | None) -> None:
        try:
            with suppress(OSError):
                sys.stdout.flush()  # prints an incomplete line
                sys.stderr.flush()
            if status is not None:
                self.show(status)
        finally:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._redirected = []
            with suppress(OSError):
                self._live.stop()


def _choose_display(plain: bool) -> Display:
    if plain or not (sys.stdout.isatty() or sys.stderr.isatty()):
        return _LogLines()
    rng_state = random.getstate()  # importing rich consumes a random number
    try:
        console = _find_console()
        return _LogLines() if console is None else _TerminalBar(console)
    except ImportError:
        logger.info('a progress bar needs rich: pip install "robo-orchard-hooks[terminal]"')
        return _LogLines()
    finally:
        random.setstate(rng_state)


def _find_console() -> Console | None:
    """Return the console to draw on; None without a terminal or with another live display.

    Standard output first, shared with rich's log handler, then standard error.
    """
    import rich
    from rich.console import Console
    from rich.file_proxy import FileProxy

    if isinstance(sys.stdout, FileProxy) or isinstance(sys.stderr, FileProxy):
        return None
    for stream, console in ((sys.stdout, rich.get_console()), (sys.stderr, Console(stderr=True))):
        # Check the stream, too: FORCE_COLOR makes a console treat any file as a terminal.
        if stream.isatty() and console.is_interactive and not console.is_dumb_terminal:
            return console
    return None


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
    ]


class _Picture:
    """Status with a bar; text that does not fit next to the bar follows on lines below."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        status = self._status
        position = _GAP.join(status.position)
        figures, metrics = [*status.measurements[:1], *status.pace], status.measurements[1:]
        layouts: list[tuple[list[str], list[list[str]]]] = [  # right of the bar, lines below
            ([*status.measurements, *status.pace], []),
            (figures, [metrics]),
            ([], [figures, metrics]),
        ]
        for right, below in layouts:  # noqa: B007 - the first layout that fits, else the last
            room = options.max_width - len(_GAP.join([position, "", *right]))
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
        grid.add_row(_text([position]), bar, *([_text(right)] if right else []))
        yield grid
        for texts in below:
            for line in _wrap(texts, options.max_width):
                yield _text(line)


def _wrap(texts: list[str], width: int) -> list[list[str]]:
    lines: list[list[str]] = []
    for text in texts:
        if lines and len(_GAP.join([*lines[-1], text])) <= width:
            lines[-1].append(text)
        else:
            lines.append([text])
    return lines


def _text(texts: list[str]) -> Text:
    from rich.text import Text

    return Text(_GAP.join(texts), no_wrap=True, overflow="ellipsis")
