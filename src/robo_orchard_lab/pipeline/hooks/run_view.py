"""Collect what is shown of a run, and decide when."""

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

# --- run status ------------------------------------------------------------------------------
# Where a run is, how fast it goes and when it ends, in words.


Outcome: TypeAlias = Literal["running", "finished", "stopped"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One look at a run.

    >>> status = RunStatus(2, 5, 34, 115, {"loss": 0.4231}, 512.3, 12.0, seconds_left=41.4)
    >>> print(status)
    epoch 2/5, step  34/115 (29 %), loss 0.4231, 512 samples/s, ETA 0:00:41
    """

    epoch: int
    """The epoch, from 1."""
    max_epoch: int | None
    steps: int
    """How many steps of the run are done."""
    total_steps: int | None
    """How many there are in all, or None where that can't be told."""
    values: dict[str, float] = field(default_factory=dict)
    samples_per_s: float | None = None
    seconds_taken: float = 0.0
    seconds_left: float | None = None
    outcome: Outcome = "running"

    @property
    def position(self) -> tuple[str, str]:
        """Epoch and step, as wide at the first step as at the last."""
        epoch = f"epoch {self.epoch}" + (f"/{self.max_epoch}" if self.max_epoch else "")
        if self.total_steps is None:
            return epoch, f"step {self.steps}"
        return epoch, f"step {self.steps:>{len(str(self.total_steps))}}/{self.total_steps}"

    @property
    def measurements(self) -> list[str]:
        """Each value behind its name."""
        return [f"{name} {number_text(value)}" for name, value in self.values.items()]

    @property
    def pace(self) -> list[str]:
        """The samples per second, and the time that is left or was taken, as far as known."""
        parts = []
        if self.samples_per_s is not None:
            digits = 0 if self.samples_per_s >= 10 else 2
            parts.append(f"{self.samples_per_s:,.{digits}f} samples/s")
        if self.outcome != "running":
            word = "took" if self.outcome == "finished" else "stopped after"
            parts.append(f"{word} {_duration(self.seconds_taken)}")
        elif self.seconds_left is not None:
            parts.append(f"ETA {_duration(self.seconds_left)}")
        return parts

    def __str__(self) -> str:
        epoch, step = self.position
        if self.total_steps:
            step += f" ({self.steps * 100 // self.total_steps} %)"
        return ", ".join([epoch, step, *self.measurements, *self.pace])


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


_RATE_WINDOW_S = 10.0
_LOSS = "loss/total"


class Display(Protocol):
    """Where a status is shown."""

    refresh_seconds: float
    quick_refresh_seconds: float
    """The least time from one look to that at the end of an epoch or at a logging point."""
    redraws: bool
    """Whether what is shown replaces what was."""

    def open(self, status: RunStatus) -> None: ...

    def show(self, status: RunStatus) -> None: ...

    def close(self, status: RunStatus | None) -> None: ...


class RunView:
    """What is shown of one loop.

    Args:
        metrics: the names to show beside the loss.
        refresh_seconds: the least time from one look to the next; None for the display's own.
        args: those of the loop.
        display: where it is shown.
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
        self._held: RunStatus | None = None  # the end of an epoch, until it is logged
        self._logged = False
        self._handles: list[RemovableHandle] = []
        now = time.perf_counter()
        self._started_at = self._shown_at = now
        self._next_at = now + self._refresh_s
        self._marks = deque([(now, 0)])  # when so many samples were done
        display.open(self._status(args.progress, now))

    def begin_epoch(self) -> None:
        """All hooks have begun the loop, so that it is known whether one logs."""
        metrics = self._args.metrics
        if metrics.is_logged and not self._logged:
            self._logged = True
            self._handles.append(metrics.listen(self._take))
            for name in self._labels:
                self._note(name, metrics.last_value(name))
        self._show_held()

    def finish_step(self, args: PipelineHookArgs) -> None:
        """On the step path: counts, looks at the clock, and seldom more."""
        self._samples += args.batch_size
        if not self._logged and not args.is_padding_step:
            self._loss = args.loss
        now = time.perf_counter()
        if now >= self._next_at:
            progress = replace(args.progress)  # as it will be when this step is over
            progress.finish_step()
            if args.at_accumulation_boundary:
                progress.finish_optimizer_step(committed=True)
            self._read_values()
            self._show(self._status(progress, now))

    def finish_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also where the data has no length
        now = time.perf_counter()
        if now < self._shown_at + self._display.quick_refresh_seconds:
            return
        self._read_values()
        status = self._status(args.progress, now)
        if self._logged:
            self._held = status
        if self._display.redraws or not self._logged:
            self._show(status)

    def close(self, args: PipelineHookArgs) -> None:
        status = None
        try:
            if args.exception is None:
                self._show_held()
                self._read_values()  # else the device may be what failed
            finished = args.exception is None and args.limits.reached(args.progress)
            status = self._status(
                args.progress, time.perf_counter(), "finished" if finished else "stopped"
            )
        finally:
            for handle in self._handles:
                handle.remove()
            self._display.close(status)

    def _take(self, record: MetricsRecord) -> None:
        """A logging point has found something."""
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
        """Show the end of an epoch with what was found there."""
        status, self._held = self._held, None
        if status is not None:
            self._show(replace(status, values=self._shown_values()))

    def _show(self, status: RunStatus) -> None:
        self._display.show(status)
        self._shown_at = time.perf_counter()
        self._next_at = self._shown_at + self._refresh_s

    def _read_values(self) -> None:
        """Waits for the device, where no logging point has done so."""
        if self._logged:
            return
        metrics = self._args.metrics
        published = metrics.names()
        self._values = {} if self._loss is None else {"loss": float(self._loss)}
        for name in self._labels:
            if name != _LOSS and name in published:
                self._values[name] = metrics.latest(name)

    def _shown_values(self) -> dict[str, float]:
        """Loss first, then the metrics in the order in which they were asked for."""
        known = self._values
        return {label: known[label] for label in self._labels.values() if label in known}

    def _status(
        self, progress: TrainerProgress, now: float, outcome: Outcome = "running"
    ) -> RunStatus:
        """The state at ``progress``, which is between two steps."""
        args = self._args
        accelerator = args.accelerator
        left = remaining_steps(
            args.limits,
            progress,
            self._steps_per_epoch,
            accelerator.gradient_accumulation_steps,
        )
        taken = now - self._started_at
        done = progress.global_step_id - self._first_step
        # After the last epoch, the counter stands at one that will not begin.
        over = outcome == "finished" and progress.step_id == 0 and progress.epoch_id > 0
        rate = self._samples / taken if outcome != "running" and done else self._rate(now)
        return RunStatus(
            epoch=progress.epoch_id + (0 if over else 1),
            max_epoch=args.max_epoch,
            steps=progress.global_step_id,
            total_steps=None if left is None else progress.global_step_id + left,
            values=self._shown_values(),
            samples_per_s=None if rate is None else rate * accelerator.num_processes,
            seconds_taken=taken,
            # By the mean over the whole loop: what is done between epochs recurs.
            seconds_left=left * taken / done if left is not None and done else None,
            outcome=outcome,
        )

    def _rate(self, now: float) -> float | None:
        """This rank's samples per second over the last seconds, or None where none are done."""
        marks = self._marks
        marks.append((now, self._samples))
        while len(marks) > 2 and marks[1][0] <= now - _RATE_WINDOW_S:
            marks.popleft()
        begin, samples_before = marks[0]
        return (self._samples - samples_before) / (now - begin) if self._samples else None
