"""Displays of a run's progress: a bar with aligned lines in a terminal, log lines elsewhere.

rich is optional and costs 50 ms to import, so only functions for the terminal import it.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from robo_orchard_core.utils.logging import one_line, visible
from robo_orchard_lab.pipeline.job_log import announce
from robo_orchard_lab.pipeline.metrics import number_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

logger = logging.getLogger("robo_orchard_lab.pipeline.hooks.progress_bar")

Outcome: TypeAlias = Literal["running", "finished", "stopped"]

_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_MIN_COLUMN_WIDTH = 9  # of a number such as 1.000e-04
_MAX_COLUMN_WIDTH = 24
_GAP = "  "


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Snapshot of a run's progress.

    >>> status = RunStatus(2, 5, 34, 115, {"loss": 0.4231}, 512.3, 12.0, seconds_left=41.4)
    >>> print(status)
    epoch 2/5, step  34/115 (29 %), loss 0.4231, 512 samples/s, ETA 0:00:41
    """

    epoch: int
    """Epoch, from 1."""
    max_epoch: int | None
    steps: int
    """Completed steps of the run."""
    total_steps: int | None
    """Steps of the complete run; None if unknown."""
    values: dict[str, float] = field(default_factory=dict)
    """Losses and metrics by label."""
    samples_per_s: float | None = None
    seconds_taken: float = 0.0
    seconds_left: float | None = None
    outcome: Outcome = "running"
    losses: int = 1
    """Number of losses, the first of the values."""

    @property
    def position(self) -> tuple[str, str]:
        """Epoch and step as text of constant width."""
        epoch = f"epoch {self.epoch}"
        if self.max_epoch:
            epoch = f"epoch {self.epoch:>{len(str(self.max_epoch))}}/{self.max_epoch}"
        if self.total_steps is None:
            return epoch, f"step {self.steps}"
        return epoch, f"step {self.steps:>{len(str(self.total_steps))}}/{self.total_steps}"

    @property
    def measurements(self) -> list[str]:
        """Texts of the measured values, each after its name."""
        return [f"{one_line(n)} {_value_text(n, value)}" for n, value in self.values.items()]

    @property
    def rate(self) -> list[str]:
        """Samples per second, as one text; empty if unknown."""
        return [] if self.samples_per_s is None else [f"{rate_text(self.samples_per_s)} samples/s"]

    @property
    def time(self) -> list[str]:
        """Remaining time of a run in progress, if known; else its duration."""
        if self.outcome != "running":
            word = "took" if self.outcome == "finished" else "stopped after"
            return [f"{word} {duration_text(self.seconds_taken)}"]
        return [] if self.seconds_left is None else [f"ETA {duration_text(self.seconds_left)}"]

    def __str__(self) -> str:
        epoch, step = self.position
        if self.total_steps:
            step += f" ({self.steps * 100 // self.total_steps} %)"
        return ", ".join([epoch, step, *self.measurements, *self.rate, *self.time])


def _is_lr(label: str) -> bool:
    return label.partition("/")[0] == "lr"


def _value_text(label: str, value: float) -> str:
    return f"{value:.2e}" if _is_lr(label) else number_text(value)


def rate_text(per_s: float) -> str:
    """Format a rate with three digits or more.

    >>> rate_text(55155.2), rate_text(0.254)
    ('55,155', '0.25')
    """
    return f"{per_s:,.{0 if per_s >= 10 else 2}f}"


def duration_text(seconds: float) -> str:
    """Format a time.

    >>> duration_text(41.4), duration_text(3600 * 51 + 62)
    ('0:00:41', '51:01:02')
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


@dataclass(frozen=True, slots=True)
class MetricResult:
    """Last and best value of a metric, and the curve of a loss as block characters."""

    name: str
    last: float
    last_step: int
    best: tuple[float, int] | None = None
    """Best value and its step; None if neither direction is known to be good."""
    curve: str = ""
    since: int = 0
    """Completed steps before the first known value; earlier values may be better."""

    def __str__(self) -> str:
        last = f"{one_line(self.name)} {number_text(self.last)} at step {self.last_step}"
        if self.best is None:
            return last
        return f"{last}, {self.best_text(number_text(self.best[0]))}"

    def best_text(self, value: str) -> str:
        """Return the best value, formatted as ``value``, with its step."""
        assert self.best is not None  # checked by the caller
        since = f", known since step {self.since}" if self.since else ""
        return f"best {value} at step {self.best[1]}{since}"


class Display(Protocol):
    """Display of a run."""

    refresh_seconds: float
    """Default time between two updates."""
    quick_refresh_seconds: float
    """Least time between updates at ends of epochs and logging points."""
    redraws: bool
    """True if an update replaces the last one."""

    def open(self, header: Mapping[str, str], status: RunStatus) -> None:
        """Show texts about the run by their labels."""

    def show(self, status: RunStatus) -> None:
        """Show an update."""

    def add_line(self, status: RunStatus) -> None:
        """Show a line that stays, with the values of an epoch or a logging point."""

    def notice(self, text: str) -> bool:
        """Show text until the next update; see ``PipelineRun.show_notice``."""

    def close(
        self, status: RunStatus | None, verdict: str, results: Sequence[MetricResult]
    ) -> None:
        """Show the last status or the verdict, and the results; then restore the terminal."""


class LogLines:
    """Display in the log, or on standard error if the log drops INFO records."""

    refresh_seconds = 10.0
    quick_refresh_seconds = 0.0  # each epoch has a line
    redraws = False

    def open(self, header: Mapping[str, str], status: RunStatus) -> None:
        for label, text in header.items():
            self._announce(f"{label}: {text}")

    def show(self, status: RunStatus) -> None:
        self._announce(str(status))

    def add_line(self, status: RunStatus) -> None: ...

    def notice(self, text: str) -> bool:
        return False

    def close(
        self, status: RunStatus | None, verdict: str, results: Sequence[MetricResult]
    ) -> None:
        if status is not None:
            self.show(status)
        for result in results:
            if result.best is not None:
                self._announce(str(result))

    @staticmethod
    def _announce(text: str) -> None:
        announce(logger, text, has_time=True)


class TerminalDisplay:
    """Bar at the bottom of a terminal; lines and other output appear above the bar.

    A terminal that disappears is not an error; drawing stops.
    """

    refresh_seconds = 0.5
    quick_refresh_seconds = 0.05  # a redraw costs about 1 ms; an epoch may be as short
    redraws = True

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(
            console=console,
            auto_refresh=False,  # a refresh thread would take time from training
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._lines = AlignedLines()
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self, header: Mapping[str, str], status: RunStatus) -> None:
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        with suppress(OSError):
            self._print_labelled({f"{label:<5}": text for label, text in header.items()})
            if header:
                self._console.print()
            self._live.start()
            self._live.update(_BarLine(status), refresh=True)
        for handler in _stream_handlers():
            if id(handler.stream) in streams:  # created before rich redirected the streams
                self._redirected.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[id(handler.stream)]))

    def show(self, status: RunStatus) -> None:
        with suppress(OSError):
            self._live.update(_BarLine(status), refresh=True)

    def add_line(self, status: RunStatus) -> None:
        with suppress(OSError):
            for style, line in self._lines.of(status, self._console.width):
                self._console.print(_text(line, style))

    def notice(self, text: str) -> bool:
        # By the file descriptor: a signal handler may have interrupted rich.
        if not self._live.is_started:
            return False
        try:
            shown = text[: self._console.width - 1].encode(errors="replace")
            os.write(self._console.file.fileno(), b"\r\x1b[2K" + shown)
        except (OSError, ValueError):  # no file behind the stream
            return False
        return True

    def close(
        self, status: RunStatus | None, verdict: str, results: Sequence[MetricResult]
    ) -> None:
        try:
            with suppress(OSError):
                sys.stdout.flush()  # prints an incomplete line
                sys.stderr.flush()
        finally:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._redirected = []
            with suppress(OSError):
                self._live.stop()
        with suppress(OSError):
            if self._lines.labels and verdict:
                self._console.print()
            if verdict:
                self._console.print(_text(verdict, "bold"), soft_wrap=True)
            for line in result_lines(results, self._console.width, self._is_ascii):
                self._console.print(_text(line))

    @property
    def _is_ascii(self) -> bool:
        return not self._console.encoding.lower().startswith("utf")

    def _print_labelled(self, texts: Mapping[str, str]) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, len(_GAP), 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in texts.items():
            table.add_row(_text(label, "bold"), visible(text))
        self._console.print(table, highlight=False, markup=False)


class AlignedLines:
    """Lines of one table with right-aligned numbers, printed one by one.

    A heading precedes the first line, and each line with new columns. Columns that do not fit next
    to the losses are left out: from the right, but the epoch before the metrics.

    >>> lines = AlignedLines()
    >>> status = RunStatus(2, 20, 60, 600, {"loss": 0.4231, "eval/val/loss": 1.5}, 512.3)
    >>> for _, line in lines.of(status, width=80):
    ...     print(line)
    epoch  step       loss   val/loss  samples/s
        2    60     0.4231     1.5000        512
    """

    def __init__(self) -> None:
        self.labels: list[str] = []
        """Labels of the values, in the order of their columns: losses, metrics, learning rates."""
        self._losses: list[str] = []
        self._widths: dict[str, int] = {}

    def of(self, status: RunStatus, width: int) -> list[tuple[str, str]]:
        """Return style and text of each line to print, for a terminal of ``width`` columns."""
        self._losses += [n for n in [*status.values][: status.losses] if n not in self._losses]
        new = [label for label in status.values if label not in self.labels]
        self.labels = sorted([*self.labels, *new], key=self._group)
        cells = {
            "epoch": str(status.epoch),
            "step": str(status.steps),
            **{name: _value_text(name, value) for name, value in status.values.items()},
            "samples/s": "" if status.samples_per_s is None else rate_text(status.samples_per_s),
        }
        counts = {"epoch": status.max_epoch, "step": status.total_steps}
        headings = {"epoch": "epoch", "step": "step", "samples/s": "samples/s"}
        headings |= {label: self._heading(label) for label in self.labels}
        widths = {
            name: max(len(heading), len(str(counts[name] or cells[name])))
            if name in counts
            else min(max(len(heading), _MIN_COLUMN_WIDTH), _MAX_COLUMN_WIDTH)
            for name, heading in headings.items()
        }
        others = self.labels[len(self._losses) :]
        names = ["step", *self._losses, "epoch", *others, "samples/s"]
        shown = self._fitting(names, widths, width)
        columns = [n for n in ("epoch", "step", *self.labels, "samples/s") if n in shown]
        fitting = {name: widths[name] for name in columns}
        rows = [("", cells)]
        if fitting != self._widths:
            rows.insert(0, ("bold", headings))
        self._widths = fitting
        return [
            (style, _GAP.join(row.get(n, "")[: widths[n]].rjust(widths[n]) for n in columns))
            for style, row in rows
        ]

    def _group(self, label: str) -> int:
        if label in self._losses:
            return 0
        return 2 if _is_lr(label) else 1

    def _heading(self, label: str) -> str:
        short = label.removeprefix("eval/")
        return one_line(label if short in self.labels else short)

    @staticmethod
    def _fitting(names: Sequence[str], widths: Mapping[str, int], width: int) -> set[str]:
        shown: set[str] = set()
        used = -len(_GAP)
        for name in names:
            used += len(_GAP) + widths[name]
            if used > width:
                break
            shown.add(name)
        return shown


def result_lines(results: Sequence[MetricResult], width: int, is_ascii: bool) -> list[str]:
    """Return aligned lines with last and best value of each metric, and the curves.

    >>> best = MetricResult("eval/val/loss", 0.0588, 600, best=(0.0571, 570))
    >>> for line in result_lines([MetricResult("loss", 0.1, 600, curve="█▄▁"), best], 80, False):
    ...     print(line)
      loss           0.1000  █▄▁
      eval/val/loss  0.0588  best 0.0571 at step 570
    """
    names = [one_line(result.name) for result in results]
    values = [number_text(result.last) for result in results]
    bests = [number_text(result.best[0]) if result.best else "" for result in results]
    name_width, value_width, best_width = (
        max(map(len, texts), default=0) for texts in (names, values, bests)
    )
    lines = []
    for result, name, value, best in zip(results, names, values, bests, strict=True):
        rest = "" if is_ascii else result.curve
        if result.best:
            rest = result.best_text(f"{best:>{best_width}}")
        line = f"{_GAP}{name:<{name_width}}{_GAP}{value:>{value_width}}{_GAP}{rest}".rstrip()
        lines.append(line if len(line) <= width else f"{_GAP}{name} {value} {rest}".rstrip())
    return lines


class _BarLine:
    """Status with a bar on one line; texts that do not fit are left out."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        status = self._status
        epoch, step = status.position
        losses = status.measurements[: status.losses]
        bar = " " * _MIN_BAR_WIDTH
        layouts = [
            [epoch, step, bar, *losses, *status.rate, *status.time],
            [epoch, step, bar, *losses, *status.time],
            [epoch, step, *losses, *status.time],
            [epoch, step, *losses[:1]],
            [step, *losses[:1]],
        ]
        # Free columns: some terminals wrap a full line, and the terminal echoes Ctrl-C as ^C.
        room = options.max_width - 3
        fits = (texts for texts in layouts if len(_GAP.join(texts)) <= room)
        texts = next(fits, [step])
        if bar not in texts:
            yield _text(_GAP.join(texts))
            return
        at = texts.index(bar)
        free = room - len(_GAP.join(texts)) + _MIN_BAR_WIDTH
        grid = Table.grid(padding=(0, len(_GAP), 0, 0))
        drawn = ProgressBar(
            total=status.total_steps,
            completed=status.steps,
            width=min(free, _MAX_BAR_WIDTH),
            complete_style="bar.finished" if status.outcome == "finished" else "cyan",
            pulse=status.total_steps is None and status.outcome == "running",
        )
        grid.add_row(_text(_GAP.join(texts[:at])), drawn, _text(_GAP.join(texts[at + 1 :])))
        yield grid


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(visible(text, ""), style, no_wrap=True, overflow="ellipsis")


def choose_display(plain: bool) -> Display:
    """Return a bar if a terminal and rich are available; else lines, also with ``plain``."""
    if plain or not (sys.stdout.isatty() or sys.stderr.isatty()):
        return LogLines()
    rng_state = random.getstate()  # importing rich consumes a random number
    try:
        console = _find_console()
        return LogLines() if console is None else TerminalDisplay(console)
    except ImportError:
        logger.info('a progress bar needs rich: pip install "robo-orchard-hooks[terminal]"')
        return LogLines()
    finally:
        random.setstate(rng_state)


def _find_console() -> Console | None:
    """Return the console to draw on; None without a terminal or with another live display."""
    import rich
    from rich.console import Console
    from rich.file_proxy import FileProxy

    if isinstance(sys.stdout, FileProxy) or isinstance(sys.stderr, FileProxy):
        return None
    # Standard output first, which is shared with rich's log handler.
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
