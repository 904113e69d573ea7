"""Hook that shows a run: header, progress bar, a line an epoch, and the result."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from ctypes import c_float
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.metric_mode import guess_mode
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import RunPreempted
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import own_level
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.metrics.history import MetricHistory
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import TrainerProgress, remaining_steps
from robo_orchard_lab.pipeline.run_display import (
    Display,
    MetricResult,
    Outcome,
    RunStatus,
    TerminalDisplay,
    choose_display,
    duration_text,
    rate_text,
)
from robo_orchard_lab.pipeline.sharding import plain_class
from robo_orchard_lab.pipeline.state_schema import errors_of

logger = logging.getLogger(__name__)

_LOSS = "loss/total"
_DEFAULT_METRICS = ("loss/*", "eval/*")
_RATE_WINDOW_S = 10.0
_LINES = 10  # of a run; the next round number of epochs lies between two lines
_LINE_EVERY_S = 60.0
_SPARKLINE_WIDTH = 24


class ProgressBarHook(PipelineHooks):
    """Header, progress bar, a line for some epochs, and the result, in a terminal.

    Register the hook first: then the end of an epoch includes values measured by other hooks. The
    bar needs rich (``pip install "robo-orchard-hooks[terminal]"``). Without rich, without a
    terminal and with ``TERM=dumb``, there are log lines: an epoch, and every 10 s.

    - Losses and metrics are those of the last logging point (``MetricsLogger``). Before the first
      one, and without logging points, they are this rank's newest values that the device has ready:
      the hook never waits for the device, except for the last loss at the end of the run.
    - Lines have the values since the line before. About ten lines a run, or one an epoch if epochs
      take over a minute; all with ``lines="all"``, or where the package's log level is DEBUG.
    - Samples/s are of all ranks, over the last 10 s; at the end, over the complete loop.
    - The result has last and best value of each metric in ``eval/``. The best one is that of a hook
      with ``mode``, or the name tells the direction, as of a loss or an accuracy.
    - A level above INFO of the package's log, ``robo_orchard_lab``, hides everything.

    - Ranks: the main process shows the progress. On all ranks, a metric in ``metrics`` without a
      publisher is an error at the end of the run.
    - State: values for the result, in that of the metrics board.
    """

    keeps_trajectory = True
    reads = ("model", "batch_size", "loss", "losses", "metrics", "learning rates")
    changes = ()
    requests = ()

    def __init__(self, cfg: ProgressBarHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.shows_result = False
        """True if a terminal shows the result of the last loop."""
        self._display: Display | None = None  # of the main process, in a loop
        self._history: MetricHistory | None = None
        self._handles = ExitStack()  # until the loop ends
        self._is_rolled_back = False
        hook = HookContext.from_callable
        self.register_hook("on_loop", hook(self._open, self._close))
        self.register_hook("on_epoch", hook(self._begin_epoch, self._finish_epoch))
        self.on_step.after(self._finish_step)

    def _open(self, args: PipelineHookArgs) -> None:
        # On every rank, so that all ranks fail together if a metric has no publisher.
        for name in self.cfg.metrics or ():
            if not _is_pattern(name):
                self._handles.enter_context(args.metrics.expect(name, self.name))
        if args.global_step_id == 0 or self._history is None:
            self._history = MetricHistory(since=args.global_step_id)
        if saved := args.metrics.add_writer(self.name, self._history.state_dict):
            with errors_of(f"the saved state of {self.name}"):
                self._history.load_state_dict(saved)
        self.shows_result = False
        run = self._run = args.run
        self._loss_names = [f"loss/{name}" for name in run.optimizer_names] or [_LOSS]
        self._values: dict[str, MetricValue] = {}
        self._is_logged = False
        self._follows_losses = True
        if not args.accelerator.is_main_process or own_level(logger) > logging.INFO:
            return
        self._losses: Mapping[str, torch.Tensor] = {}  # of the last step, by metric
        self._reader = _DeviceReader()
        self._held: RunStatus | None = None  # of the end of an epoch, until its values are there
        self._steps_per_epoch = run.steps_per_epoch
        self._first_step = args.global_step_id
        self._samples = 0
        self._started_at = self._shown_at = self._line_at = now = time.perf_counter()
        self._line_step = args.global_step_id
        self._marks = deque([(now, 0)])  # pairs (time, samples until then)
        display = choose_display(self.cfg.plain)
        self._refresh_s = self.cfg.refresh_seconds or display.refresh_seconds
        self._next_at = now if display.redraws else now + self._refresh_s
        status = self._status(args.progress, now)
        display.open({} if self._is_rolled_back else _describe_run(run, status), status)
        self._is_rolled_back = False
        self._display = display
        run.show_notice = display.notice

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        """Listen to logging points; by now every hook has begun the loop."""
        if not args.accelerator.is_main_process:
            return
        if args.metrics.is_logged and not self._is_logged:  # also a hidden run has a history
            self._is_logged = True
            self._handles.enter_context(args.metrics.listen(self._receive))
            self._store(args.metrics.last_values())
            self._follows_losses = not any(name in self._values for name in self._loss_names)
        if self._is_logged and self._display is not None:
            self._show_held()

    def _finish_step(self, args: PipelineHookArgs) -> None:
        """Count samples and check the clock; on the step path."""
        if self._display is None or args._exception is not None:
            return
        self._samples += args._batch_size or args.batch_size  # a call of a property costs 1 us
        if self._follows_losses and not args.is_padding_step:
            if (loss := args.loss) is not None:
                self._losses = {_LOSS: loss}
            else:
                self._losses = {f"loss/{name}": each for name, each in args.losses.items()}
        now = time.perf_counter()
        if now >= self._next_at:
            progress = replace(args.progress)  # the counters after this step
            progress.finish_step()
            is_counted = args._named is not None and args._named.is_counted
            if args.at_accumulation_boundary and not is_counted:
                progress.finish_optimizer_step(committed=True)
            self._update(progress, now)

    def _update(self, progress: TrainerProgress, now: float) -> None:
        """Show an update, or try again after the next step if the device is not ready."""
        if not self._read_values(progress.global_step_id):
            self._next_at = now
        elif self._held is not None:
            self._show_held()
        else:
            self._show(self._status(progress, now))

    def _finish_epoch(self, args: PipelineHookArgs) -> None:
        """Show the end of the epoch, after its logging point if there is one."""
        if self._display is None or args.exception is not None:
            return
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also for data without a length
        now = time.perf_counter()
        self._held = self._status(args.progress, now)
        is_ready = self._read_values(args.global_step_id)
        if not self._is_logged:
            if is_ready:
                self._show_held()
            else:
                self._next_at = now
        elif self._display.redraws and self._is_time_for_update(now):
            self._show(self._with_values(self._held))

    def _close(self, args: PipelineHookArgs) -> None:
        self._handles.close()
        if self._display is None:
            return
        status, verdict, results = None, "", list[MetricResult]()
        try:
            if args.exception is None:  # else the device may have failed
                self._read_values(args.global_step_id, wait=True)
                self._show_held()
            now = time.perf_counter()
            self._is_rolled_back = args.requests.rollback_request is not None
            finished = args.exception is None and args.limits.reached(args.progress)
            status = self._status(args.progress, now, "finished" if finished else "stopped")
            if not self._is_rolled_back:
                verdict = self._verdict(args, status)
                stop = args.requests.stop_request
                if finished or (args.exception is None and stop and stop.exit_code is None):
                    results = self._results()
        finally:
            display, self._display = self._display, None
            args.run.show_notice = lambda text: False
            display.close(status, verdict, results)
        self.shows_result = isinstance(display, TerminalDisplay) and bool(verdict)

    def _receive(self, record: MetricsRecord) -> None:
        """Store the values of a logging point, and show them."""
        self._store(record.values)
        self._follows_losses &= not any(name in self._values for name in self._loss_names)
        now, display = time.perf_counter(), self._display
        if display is None:
            return
        if self._held is not None:
            self._show_held()
        elif display.redraws:
            status = self._status(self._run.progress, now)
            self._add_line(status, is_epoch=False)
            if self._is_time_for_update(now):
                self._show(status)

    def _store(self, values: Iterable[MetricValue]) -> None:
        values = [*values]
        self._values |= {value.name: value for value in values}
        kept = [v for v in values if v.name in self._loss_names or v.name.startswith("eval/")]
        assert self._history is not None  # in a loop
        self._history.add(kept, self._loss_names)

    def _show_held(self) -> None:
        status, self._held = self._held, None
        if status is not None:
            status = self._with_values(status)
            self._add_line(status, is_epoch=True)
            assert self._display is not None  # in a loop
            if not self._display.redraws or self._is_time_for_update(time.perf_counter()):
                self._show(status)

    def _add_line(self, status: RunStatus, is_epoch: bool) -> None:
        """Show a line if it is time for one."""
        if self._is_line_due(status, is_epoch) and status.steps > self._line_step:
            new = {v.name for v in self._values.values() if v.step > self._line_step}
            labels = {label for name, label in self._labels().items() if name in new}
            fresh = {n: v for n, v in status.values.items() if n in labels or n[:2] == "lr"}
            losses = sum(label in fresh for label in [*status.values][: status.losses])
            assert self._display is not None  # in a loop
            self._display.add_line(replace(status, values=fresh, losses=losses))
            self._line_at, self._line_step = time.perf_counter(), status.steps

    def _is_line_due(self, status: RunStatus, is_epoch: bool) -> bool:
        if self.cfg.lines == "all" or 0 < own_level(logger) <= logging.DEBUG:
            return True
        total, epoch = status.total_steps, self._steps_per_epoch or None
        has_epochs = total is None or (epoch is not None and total >= _LINES / 2 * epoch)
        if has_epochs and not is_epoch:
            return False
        if time.perf_counter() - self._line_at >= _LINE_EVERY_S:
            return True
        if total is None:  # until the first epoch ends; then with fewer and fewer lines
            return status.steps >= 2 * self._line_step
        between = total / _LINES
        if has_epochs and epoch is not None:
            between = epoch * _round_up(total / epoch / _LINES)
        return status.steps // between > self._line_step // between or status.steps >= total

    def _show(self, status: RunStatus) -> None:
        assert self._display is not None  # in a loop
        self._display.show(status)
        self._shown_at = time.perf_counter()
        self._next_at = self._shown_at + self._refresh_s

    def _is_time_for_update(self, now: float) -> bool:
        assert self._display is not None  # in a loop
        return now >= self._shown_at + self._display.quick_refresh_seconds

    def _read_values(self, step: int, *, wait: bool = False) -> bool:
        """Read losses, and metrics that no hook logs, once the device has them.

        Returns False if the device does not have them yet. ``wait`` is a device sync.
        """
        if not self._follows_losses:
            return True
        if not self._reader.is_reading:
            newest: dict[str, Any] = dict(self._losses)
            metrics = self._run.metrics
            if not self._is_logged:
                found = {name: metrics.newest(name) for name in self._selected(metrics.names())}
                newest = {n: v for n, v in found.items() if v is not None} | newest
            self._reader.start(newest)
        values = self._reader.result(wait=wait)
        if values is None:
            return False
        read = [MetricValue(name, value, step) for name, value in values.items()]
        self._values |= {value.name: value for value in read}
        if not self._is_logged:
            self._store(read)
        return True

    def _selected(self, names: Iterable[str]) -> list[str]:
        """Return the names to show: losses, then metrics in the order of the config."""
        known = [*names]
        patterns = _DEFAULT_METRICS if self.cfg.metrics is None else self.cfg.metrics
        found = [*self._loss_names]
        for pattern in patterns:
            found += [n for n in known if n not in found and fnmatchcase(n, pattern)]
        if self.cfg.metrics is None:  # means over the epoch, close to the others
            found = [name for name in found if not name.endswith("_epoch")]
        return [name for name in found if name in known]

    def _labels(self) -> dict[str, str]:
        """Return the label of each known metric to show."""
        return {n: "loss" if n == _LOSS else n for n in self._selected(self._values)}

    def _with_values(self, status: RunStatus) -> RunStatus:
        labels = self._labels()
        values = {label: self._values[name].value for name, label in labels.items()}
        losses = sum(name.startswith("loss/") for name in labels)
        if self.cfg.metrics is None:
            values |= _learning_rates(self._run)
        return replace(status, values=values, losses=losses)

    def _results(self) -> list[MetricResult]:
        results, history = [], self._history
        assert history is not None  # in a loop
        names = [*self._loss_names, *sorted(history.extremes.keys() - {*self._loss_names})]
        for name in names:
            if (found := history.extremes.get(name)) is None:
                continue
            curve = history.curves.get(name)
            mode = self._run.metric_modes.get(name) or guess_mode(name)
            best = found.best(mode) if mode is not None and name.startswith("eval/") else None
            label = "loss" if name == _LOSS else name
            line = "" if curve is None else curve.sparkline(_SPARKLINE_WIDTH)
            last = found.last, found.last_step
            results.append(MetricResult(label, *last, best, line, since=history.since))
        return results

    def _verdict(self, args: PipelineHookArgs, status: RunStatus) -> str:
        """Return the outcome of the run as one line."""
        steps, total, took = status.steps, status.total_steps, duration_text(status.seconds_taken)
        place = "" if self._run.folder is None else f"{self._run.folder}: "
        if status.outcome == "finished":
            rate = status.samples_per_s
            speed = "" if rate is None else f", {rate_text(rate)} samples/s"
            return f"{place}completed after {steps} steps in {took}{speed}"
        of = "" if total is None else f" of {total}"
        stop = args.requests.stop_request
        is_failure = not isinstance(args.exception, KeyboardInterrupt | RunPreempted | None)
        word = "failed" if is_failure else "stopped"
        why = "" if stop is None or is_failure else f" ({stop.reason})"
        return f"{place}{word} after {steps}{of} steps in {took}{why}"

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
        status = RunStatus(
            epoch=progress.epoch_id + (0 if is_over else 1),
            max_epoch=run.limits.max_epoch,
            steps=progress.global_step_id,
            total_steps=None if left is None else progress.global_step_id + left,
            samples_per_s=None if rate is None else rate * accelerator.num_processes,
            seconds_taken=taken,
            # By the mean over the complete loop, since work between epochs recurs.
            seconds_left=left * taken / done if left is not None and done else None,
            outcome=outcome,
        )
        return self._with_values(status)

    def _rate(self, now: float) -> float | None:
        """Return this rank's samples/s over the last 10 s; None before the first sample."""
        marks = self._marks
        marks.append((now, self._samples))
        while len(marks) > 2 and marks[1][0] <= now - _RATE_WINDOW_S:
            marks.popleft()
        begin, samples_before = marks[0]
        return (self._samples - samples_before) / (now - begin) if self._samples else None


class ProgressBarHookConfig(PipelineHooksConfig[ProgressBarHook]):
    """Metrics and lines to show, and refresh interval.

    >>> ProgressBarHookConfig(metrics=["grad_norm", "eval/*/accuracy"])().name
    'ProgressBarHook'
    """

    class_type: type[ProgressBarHook] = ProgressBarHook
    metrics: list[str] | None = Field(
        default=None,
        description="Names of metrics, or patterns such as 'eval/*', to show after the loss; by "
        "default losses, evaluations and learning rates.",
    )
    lines: Literal["auto", "all"] = Field(
        default="auto",
        description="Lines that stay in a terminal: 'auto' for about ten a run, or one an epoch "
        "if epochs take over a minute; 'all' for each epoch and logging point.",
    )
    refresh_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Least time between two updates, in seconds; None for 0.5 (bar) or 10 (lines).",
    )
    plain: bool = Field(
        default=False, description="Write lines to a terminal, too, for example under a debugger."
    )


class _DeviceReader:
    """Copy of a few values to the host, without waiting for the device.

    An accelerator copies to pinned memory behind its queued work, and an event tells the end.
    """

    def __init__(self) -> None:
        self.is_reading = False
        self._buffers: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._copied: list[str] = []
        self._event: torch.Event | None = None

    def start(self, values: Mapping[str, float | torch.Tensor]) -> None:
        self._numbers, self._copied, self._event, self.is_reading = {}, [], None, True
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                self._numbers[name] = float(value)
                continue
            value = value.detach().reshape(())
            is_pinned = value.device.type in ("cuda", "xpu")
            if name not in self._buffers:
                self._buffers[name] = torch.empty((), dtype=torch.float32, pin_memory=is_pinned)
            self._buffers[name].copy_(value, non_blocking=is_pinned)
            self._copied.append(name)
            if is_pinned:
                self._event = self._event or torch.Event(value.device.type)
        if self._event is not None:
            self._event.record()

    def result(self, *, wait: bool = False) -> dict[str, float] | None:
        """Return the values, or None if the device has not copied them yet."""
        if self._event is not None and not self._event.query():
            if not wait:
                return None
            self._event.synchronize()
        self.is_reading = False
        copied = {name: self._buffers[name].data_ptr() for name in self._copied}
        # Not by item(), which means a wait for the device elsewhere.
        return self._numbers | {n: c_float.from_address(at).value for n, at in copied.items()}


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _round_up(number: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ...

    >>> [_round_up(number) for number in (0.2, 2, 2.1, 30)]
    [1, 2, 5, 50]
    """
    size = 1
    while True:
        for factor in (1, 2, 5):
            if factor * size >= number:
                return factor * size
        size *= 10


def _learning_rates(run: PipelineRun) -> dict[str, float]:
    """Return the learning rate of each optimizer's first group, unless a device has it."""
    found = {}
    for name, optimizer in run.optimizers.items():
        rate = optimizer.param_groups[0].get("lr")
        if not isinstance(rate, torch.Tensor) or rate.device.type == "cpu":
            found[f"lr/{name}" if name else "lr"] = float(rate) if rate is not None else 0.0
    return found


def _describe_run(run: PipelineRun, status: RunStatus) -> dict[str, str]:
    """Return model, data, device, length and start of a run, by label."""
    accelerator, model = run.accelerator, plain_model(run)
    epochs, steps, of_epoch = status.max_epoch, status.total_steps, run.steps_per_epoch
    if epochs is not None and steps is not None and of_epoch and steps < epochs * of_epoch:
        epochs = None  # another limit comes first
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    count = sum(p.numel() for p in parameters)
    frozen = count - sum(p.numel() for p in parameters if p.requires_grad)
    processes = accelerator.num_processes
    texts = {
        "model": [
            f"{plain_class(model).__name__}",
            f"{count:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""),
            f"on {_device_name(accelerator.device)}"
            + (f", {processes} processes" if processes > 1 else ""),
            "" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        ],
        "data": _describe_data(run),
        "run": [
            "" if epochs is None else _count(epochs, "epoch"),
            "" if steps is None else _count(steps, "step"),
            "" if run.folder is None else f"in {run.folder}",
            "new"
            if run.progress.global_step_id == 0
            else f"resumed after step {run.progress.global_step_id}"
            + ("" if run.resumed_from is None else f", from {run.resumed_from.name}"),
        ],
    }
    return {label: ", ".join(filter(None, parts)) for label, parts in texts.items()}


def _describe_data(run: PipelineRun) -> list[str]:
    loader: Any = getattr(run.dataloader, "base_dataloader", run.dataloader)
    data = getattr(loader, "dataset", loader)
    try:
        size = None if data is loader else len(data)
    except TypeError:  # a stream
        size = None
    steps = run.steps_per_epoch
    return [
        type(data).__name__,
        "" if size is None else _count(size, "sample"),
        "" if steps is None else f"{_count(steps, 'step')} an epoch",
    ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
