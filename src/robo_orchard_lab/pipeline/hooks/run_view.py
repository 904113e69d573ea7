"""Progress of a run for `ProgressBarHook`: collect the values and decide when to show them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias

import torch

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, number_text
from robo_orchard_lab.pipeline.progress import TrainerProgress, remaining_steps

Outcome: TypeAlias = Literal["running", "finished", "stopped"]

_RATE_WINDOW_S = 10.0
_LOSS = "loss/total"


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
        return [f"{name} {number_text(value)}" for name, value in self.values.items()]

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


class Display(Protocol):
    """Output for statuses: a terminal or log lines."""

    refresh_seconds: float
    quick_refresh_seconds: float
    """Least time before an update at a logging point or at the end of an epoch."""
    redraws: bool
    """True if a new status replaces the previous one."""

    def open(self, status: RunStatus) -> None: ...

    def show(self, status: RunStatus) -> None: ...

    def close(self, status: RunStatus | None) -> None: ...


class RunView:
    """Progress of one loop on a display.

    If a hook logs metrics, values come from logging points. Otherwise the view reads the loss of
    the latest batch and the metrics itself, a device sync each time.

    Args:
        metrics: names to show after the loss.
        refresh_seconds: least time between two updates; None for the display's default.
        args: of the loop.
        display: output.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        refresh_seconds: float | None,
        args: PipelineHookArgs,
        display: Display,
    ) -> None:
        self._args = args
        self._display = display
        self._labels = {_LOSS: "loss"} | {name: name for name in metrics if name != _LOSS}
        self._refresh_s = refresh_seconds or display.refresh_seconds
        self._steps_per_epoch = args.run.steps_per_epoch
        self._first_step = args.global_step_id
        self._samples = 0
        self._loss: torch.Tensor | None = None
        self._values: dict[str, float] = {}
        self._held: RunStatus | None = None  # of the end of an epoch, until its values are logged
        self._is_logged = False
        self._handles: list[RemovableHandle] = []
        now = time.perf_counter()
        self._started_at = self._shown_at = now
        self._next_at = now + self._refresh_s
        self._marks = deque([(now, 0)])  # pairs (time, samples until then)
        display.open(self._status(args.progress, now))

    def begin_epoch(self) -> None:
        """Subscribe to logging points; by now every hook has begun the loop."""
        metrics = self._args.metrics
        if metrics.is_logged and not self._is_logged:
            self._is_logged = True
            self._handles.append(metrics.listen(self._receive))
            for name in self._labels:
                self._note(name, metrics.last_value(name))
        self._show_held()

    def finish_step(self, args: PipelineHookArgs) -> None:
        """Count samples and check the clock; on the step path."""
        self._samples += args.batch_size
        if not self._is_logged and not args.is_padding_step:
            self._loss = args.loss
        now = time.perf_counter()
        if now >= self._next_at:
            progress = replace(args.progress)  # the counters after this step
            progress.finish_step()
            if args.at_accumulation_boundary:
                progress.finish_optimizer_step(committed=True)
            self._read_values()
            self._show(self._status(progress, now))

    def finish_epoch(self, args: PipelineHookArgs) -> None:
        """Show the end of the epoch, after its logging point if there is one."""
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also for data without a length
        now = time.perf_counter()
        if now < self._shown_at + self._display.quick_refresh_seconds:
            return
        self._read_values()
        status = self._status(args.progress, now)
        if self._is_logged:
            self._held = status
        if self._display.redraws or not self._is_logged:
            self._show(status)

    def close(self, args: PipelineHookArgs) -> None:
        """Show the final status and close the display."""
        status = None
        try:
            if args.exception is None:  # else the device may have failed
                self._show_held()
                self._read_values()
            finished = args.exception is None and args.limits.reached(args.progress)
            status = self._status(
                args.progress, time.perf_counter(), "finished" if finished else "stopped"
            )
        finally:
            for handle in self._handles:
                handle.remove()
            self._display.close(status)

    def _receive(self, record: MetricsRecord) -> None:
        """Take the values of a logging point."""
        for value in record.values:
            self._note(value.name, value.value)
        now = time.perf_counter()
        if self._held is not None:
            self._show_held()
        elif self._display.redraws and now >= self._shown_at + self._display.quick_refresh_seconds:
            self._show(self._status(self._args.progress, now))

    def _note(self, name: str, value: float | None) -> None:
        label = self._labels.get(name)
        if label is not None and value is not None:
            self._values[label] = value

    def _show_held(self) -> None:
        status, self._held = self._held, None
        if status is not None:
            self._show(replace(status, values=self._ordered_values()))

    def _show(self, status: RunStatus) -> None:
        self._display.show(status)
        self._shown_at = time.perf_counter()
        self._next_at = self._shown_at + self._refresh_s

    def _read_values(self) -> None:
        """Read loss and metrics unless a hook logs; a device sync."""
        if self._is_logged:
            return
        metrics = self._args.metrics
        published = metrics.names()
        self._values = {} if self._loss is None else {"loss": float(self._loss)}
        for name in self._labels:
            if name != _LOSS and name in published:
                self._values[name] = metrics.latest(name)

    def _ordered_values(self) -> dict[str, float]:
        known = self._values
        return {label: known[label] for label in self._labels.values() if label in known}

    def _status(
        self, progress: TrainerProgress, now: float, outcome: Outcome = "running"
    ) -> RunStatus:
        args = self._args
        accelerator = args.accelerator
        left = remaining_steps(
            args.limits, progress, self._steps_per_epoch, accelerator.gradient_accumulation_steps
        )
        taken = now - self._started_at
        done = progress.global_step_id - self._first_step
        # After the last epoch, the counter is at an epoch that never begins.
        is_over = outcome == "finished" and progress.step_id == 0 and progress.epoch_id > 0
        rate = self._samples / taken if outcome != "running" and done else self._rate(now)
        return RunStatus(
            epoch=progress.epoch_id + (0 if is_over else 1),
            max_epoch=args.max_epoch,
            steps=progress.global_step_id,
            total_steps=None if left is None else progress.global_step_id + left,
            values=self._ordered_values(),
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
