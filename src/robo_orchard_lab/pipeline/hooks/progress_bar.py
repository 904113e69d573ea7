"""Hook that shows the progress of a run: a bar in a terminal, log lines elsewhere.

rich is optional and costs 50 ms to import, so only functions for the terminal import it.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import announce
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue, number_text
from robo_orchard_lab.pipeline.progress import TrainerProgress, remaining_steps

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["running", "finished", "stopped"]

_LOSS = "loss/total"
_RATE_WINDOW_S = 10.0
_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_GAP = "  "


class ProgressBarHook(PipelineHooks):
    """Progress bar in a terminal, log lines elsewhere: epoch, step, loss, samples/s, ETA.

    Register the hook first: then the end of an epoch includes values measured by other hooks. The
    bar needs rich (``pip install "robo-orchard-hooks[terminal]"``); without rich there are lines.

    With a hook that logs metrics (``MetricsLogger``), loss (``loss/total``) and metrics are those
    of the last logging point. Otherwise the loss is this rank's latest one, and each update is a
    device sync. Samples/s are of all ranks, over the last 10 s; at the end, over the complete loop.

    - Ranks: the main process shows the progress. On all ranks, a metric in ``metrics`` without a
      publisher is an error at the end of the run.
    - State: none.
    """

    keeps_trajectory = True
    reads = ("batch_size", "loss", "losses", "metrics")
    changes = ()
    requests = ()

    def __init__(self, cfg: ProgressBarHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._display: _LogLines | _TerminalBar | None = None  # of the main process, in a loop
        self._handles = ExitStack()  # until the loop ends
        hook = HookContext.from_callable
        self.register_hook("on_loop", hook(self._open, self._close))
        self.register_hook("on_epoch", hook(self._begin_epoch, self._finish_epoch))
        self.on_step.after(self._finish_step)

    def _open(self, args: PipelineHookArgs) -> None:
        # On every rank, so that all ranks fail together if a metric has no publisher.
        for name in self.cfg.metrics:
            self._handles.enter_context(args.metrics.expect(name, self.name))
        if not args.accelerator.is_main_process:
            return
        self._run = args.run
        self._losses: Mapping[str, torch.Tensor] = {}  # of the last step, by metric
        losses = {f"loss/{name}": f"loss/{name}" for name in args.run.optimizer_names}
        self._labels = losses or {_LOSS: "loss"}
        self._labels |= {name: name for name in self.cfg.metrics if name not in self._labels}
        self._values: dict[str, float] = {}
        self._is_logged = False
        self._held: RunStatus | None = None  # of the end of an epoch, until its values are logged
        self._steps_per_epoch = args.run.steps_per_epoch
        self._first_step = args.global_step_id
        self._samples = 0
        self._started_at = self._shown_at = now = time.perf_counter()
        self._marks = deque([(now, 0)])  # pairs (time, samples until then)
        display = _choose_display(self.cfg.plain)
        self._refresh_s = self.cfg.refresh_seconds or display.refresh_seconds
        self._next_at = now + self._refresh_s
        display.open(self._status(args.progress, now))
        self._display = display

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        """Listen to logging points; by now every hook has begun the loop."""
        if self._display is None:
            return
        if args.metrics.is_logged and not self._is_logged:
            self._is_logged = True
            self._handles.enter_context(args.metrics.listen(self._receive))
            self._store(args.metrics.last_values())
        self._show_held()

    def _finish_step(self, args: PipelineHookArgs) -> None:
        """Count samples and check the clock; on the step path."""
        if self._display is None or args.exception is not None:
            return
        self._samples += args.batch_size
        if not self._is_logged and not args.is_padding_step:
            loss = args.loss
            named = {f"loss/{name}": each for name, each in args.losses.items()}
            self._losses = named if loss is None else {_LOSS: loss}
        now = time.perf_counter()
        if now >= self._next_at:
            progress = replace(args.progress)  # the counters after this step
            progress.finish_step()
            is_counted = args._named is not None and args._named.is_counted
            if args.at_accumulation_boundary and not is_counted:
                progress.finish_optimizer_step(committed=True)
            self._read_values()
            self._show(self._status(progress, now))

    def _finish_epoch(self, args: PipelineHookArgs) -> None:
        """Show the end of the epoch, after its logging point if there is one."""
        if self._display is None or args.exception is not None:
            return
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also for data without a length
        now = time.perf_counter()
        if now >= self._shown_at + self._display.quick_refresh_seconds:
            self._read_values()
            status = self._status(args.progress, now)
            if self._is_logged:
                self._held = status
            if self._display.redraws or not self._is_logged:
                self._show(status)

    def _close(self, args: PipelineHookArgs) -> None:
        self._handles.close()
        if self._display is None:
            return
        status = None
        try:
            if args.exception is None:  # else the device may have failed
                self._show_held()
                self._read_values()
            finished = args.exception is None and args.limits.reached(args.progress)
            outcome: Outcome = "finished" if finished else "stopped"
            status = self._status(args.progress, time.perf_counter(), outcome)
        finally:
            display, self._display = self._display, None
            display.close(status)

    def _receive(self, record: MetricsRecord) -> None:
        """Store the values of a logging point, and show them."""
        self._store(record.values)
        now, display = time.perf_counter(), self._display
        assert display is not None  # in a loop
        if self._held is not None:
            self._show_held()
        elif display.redraws and now >= self._shown_at + display.quick_refresh_seconds:
            self._show(self._status(self._run.progress, now))

    def _store(self, values: Iterable[MetricValue]) -> None:
        self._values |= {value.name: value.value for value in values}

    def _show_held(self) -> None:
        status, self._held = self._held, None
        if status is not None:
            self._show(replace(status, values=self._labelled_values()))

    def _show(self, status: RunStatus) -> None:
        assert self._display is not None  # in a loop
        self._display.show(status)
        self._shown_at = time.perf_counter()
        self._next_at = self._shown_at + self._refresh_s

    def _read_values(self) -> None:
        """Read loss and metrics unless a hook logs; a device sync."""
        if not self._is_logged:
            metrics = self._run.metrics
            self._values = {name: float(loss) for name, loss in self._losses.items()}
            for name in metrics.names():
                if name not in self._losses and name in self._labels:
                    self._values[name] = metrics.latest(name)

    def _labelled_values(self) -> dict[str, float]:
        known = self._values
        return {label: known[name] for name, label in self._labels.items() if name in known}

    def _status(
        self, progress: TrainerProgress, now: float, outcome: Outcome = "running"
    ) -> RunStatus:
        run, accelerator = self._run, self._run.accelerator
        window = accelerator.gradient_accumulation_steps
        left = remaining_steps(run.limits, progress, self._steps_per_epoch, window)
        taken = now - self._started_at
        done = progress.global_step_id - self._first_step
        # After the last epoch, the counter is at an epoch that never begins.
        is_over = outcome == "finished" and progress.step_id == 0 and progress.epoch_id > 0
        rate = self._samples / taken if outcome != "running" and done else self._rate(now)
        return RunStatus(
            epoch=progress.epoch_id + (0 if is_over else 1),
            max_epoch=run.limits.max_epoch,
            steps=progress.global_step_id,
            total_steps=None if left is None else progress.global_step_id + left,
            values=self._labelled_values(),
            samples_per_s=None if rate is None else rate * accelerator.num_processes,
            seconds_taken=taken,
            # By the mean over the complete loop, since work between epochs recurs.
            seconds_left=left * taken / done if left is not None and done else None,
            outcome=outcome,
        )

    def _rate(self, now: float) -> float | None:
        """Return this rank's samples/s over the last 10 s; None before the first sample."""
        marks = self._marks
        marks.append((now, self._samples))
        while len(marks) > 2 and marks[1][0] <= now - _RATE_WINDOW_S:
            marks.popleft()
        begin, samples_before = marks[0]
        return (self._samples - samples_before) / (now - begin) if self._samples else None


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
    """Loss and metrics by label."""
    samples_per_s: float | None = None
    seconds_taken: float = 0.0
    seconds_left: float | None = None
    outcome: Outcome = "running"

    @property
    def position(self) -> tuple[str, str]:
        """Epoch and step as text of constant width."""
        epoch = f"epoch {self.epoch}" + (f"/{self.max_epoch}" if self.max_epoch else "")
        if self.total_steps is None:
            return epoch, f"step {self.steps}"
        return epoch, f"step {self.steps:>{len(str(self.total_steps))}}/{self.total_steps}"

    @property
    def measurements(self) -> list[str]:
        """Names with values."""
        return [f"{one_line(name)} {number_text(value)}" for name, value in self.values.items()]

    @property
    def pace(self) -> list[str]:
        """Samples per second, and time left or taken, if known."""
        texts = []
        if self.samples_per_s is not None:
            digits = 0 if self.samples_per_s >= 10 else 2
            texts.append(f"{self.samples_per_s:,.{digits}f} samples/s")
        if self.outcome != "running":
            word = "took" if self.outcome == "finished" else "stopped after"
            texts.append(f"{word} {_duration(self.seconds_taken)}")
        elif self.seconds_left is not None:
            texts.append(f"ETA {_duration(self.seconds_left)}")
        return texts

    def __str__(self) -> str:
        epoch, step = self.position
        if self.total_steps:
            step += f" ({self.steps * 100 // self.total_steps} %)"
        return ", ".join([epoch, step, *self.measurements, *self.pace])


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


class _LogLines:
    """Display in the log, or on standard error if the log drops INFO records."""

    refresh_seconds = 10.0
    quick_refresh_seconds = 0.0  # each epoch has a line
    redraws = False

    def open(self, status: RunStatus) -> None:
        """Show nothing yet."""

    def show(self, status: RunStatus) -> None:
        announce(logger, str(status))

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


def _choose_display(plain: bool) -> _LogLines | _TerminalBar:
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
