"""Show how far a run has come."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from dataclasses import replace
from typing import Protocol

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.batch_size import count_batches, count_samples
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks._run_status import Outcome, RunStatus, remaining_steps
from robo_orchard_lab.pipeline.progress import TrainerProgress

logger = logging.getLogger(__name__)

_RATE_WINDOW_S = 10.0


class ProgressBarHook(PipelineHooks):
    """A progress bar in a terminal, log lines elsewhere: epoch, step, loss, samples/s, time left.

    Register it first: then it shows at the end of an epoch what the other hooks have measured.

    Only the main process shows anything. The loss is that of the latest batch on its rank, the
    samples/s are those of the whole job over the last 10 s, at the end over the whole loop. Loss
    and metrics are read, which waits for the device, only when they are shown: once in
    ``refresh_seconds``, at the end of an epoch and at the end.
    """

    def __init__(self, cfg: ProgressBarHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._view: _RunView | None = None
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._open, after=self._close)
        )
        self.register_hook("on_epoch", HookContext.from_callable(after=self._finish_epoch))
        self.register_hook("on_step", HookContext.from_callable(after=self._finish_step))

    def _open(self, args: PipelineHookArgs) -> None:
        if args.accelerator.is_main_process:
            self._view = _RunView(self.cfg, args, _display(self.cfg.plain))

    def _finish_step(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_step(args)

    def _finish_epoch(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_epoch(args)

    def _close(self, args: PipelineHookArgs) -> None:
        view, self._view = self._view, None
        if view is not None:
            view.close(args)


class ProgressBarHookConfig(PipelineHooksConfig[ProgressBarHook]):
    """What to show and how often.

    >>> ProgressBarHookConfig(metrics=["grad_norm"])().name
    'ProgressBarHook'
    """

    class_type: type[ProgressBarHook] = ProgressBarHook
    metrics: list[str] = Field(
        default=[], description="Names on the metrics board to show beside the loss."
    )
    refresh_seconds: float | None = Field(
        default=None,
        gt=0,
        description="The least time from one look to the next; by default 0.5 for a bar "
        "and 10 for lines.",
    )
    plain: bool = Field(
        default=False,
        description="Write lines to a terminal, too; a debugger needs it, for example.",
    )


class _Display(Protocol):
    refresh_seconds: float
    epoch_refresh_seconds: float
    """The least time from one look to that at the end of an epoch."""

    def open(self, status: RunStatus) -> None: ...

    def show(self, status: RunStatus) -> None: ...

    def close(self, status: RunStatus | None) -> None: ...


class _RunView:
    """What is shown of one loop."""

    def __init__(
        self, cfg: ProgressBarHookConfig, args: PipelineHookArgs, display: _Display
    ) -> None:
        self._display = display
        self._metrics = cfg.metrics
        self._refresh_s = cfg.refresh_seconds or display.refresh_seconds
        self._steps_per_epoch = count_batches(args.dataloader)
        self._first_step = args.global_step_id
        self._samples = 0
        self._loss: torch.Tensor | None = None
        self._values: dict[str, float] = {}
        now = time.perf_counter()
        self._started_at = self._shown_at = now
        self._next_at = now + self._refresh_s
        self._marks = deque([(now, 0)])  # when so many samples were done
        display.open(self._status(args, args.progress, now))

    def finish_step(self, args: PipelineHookArgs) -> None:
        """On the step path: counts, looks at the clock, and seldom more."""
        self._samples += count_samples(args.batch)
        self._loss = args.loss
        now = time.perf_counter()
        if now >= self._next_at:
            progress = replace(args.progress)  # as it will be when this step is over
            progress.finish_step()
            if args.at_accumulation_boundary:
                progress.finish_optimizer_step(committed=True)
            self._show(args, progress, now)

    def finish_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also where the data has no length
        now = time.perf_counter()
        if now >= self._shown_at + self._display.epoch_refresh_seconds:
            self._show(args, args.progress, now)

    def close(self, args: PipelineHookArgs) -> None:
        status = None
        try:
            if args.exception is None:
                self._read_values(args)  # else the device may be what failed
            finished = args.exception is None and args.limits.reached(args.progress)
            status = self._status(
                args, args.progress, time.perf_counter(), "finished" if finished else "stopped"
            )
        finally:
            self._display.close(status)
        unknown = [name for name in self._metrics if name not in args.metrics.names()]
        if unknown and args.exception is None:
            logger.warning(
                "no hook published %s, which the progress bar was to show; published: %s",
                ", ".join(unknown),
                ", ".join(args.metrics.names()) or "none",
            )

    def _show(self, args: PipelineHookArgs, progress: TrainerProgress, now: float) -> None:
        self._read_values(args)
        self._display.show(self._status(args, progress, now))
        self._shown_at = time.perf_counter()
        self._next_at = self._shown_at + self._refresh_s

    def _read_values(self, args: PipelineHookArgs) -> None:
        """Waits for the device."""
        published = args.metrics.names()
        self._values = {} if self._loss is None else {"loss": float(self._loss)}
        for name in self._metrics:
            if name in published:
                self._values[name] = args.metrics.latest(name)

    def _status(
        self,
        args: PipelineHookArgs,
        progress: TrainerProgress,
        now: float,
        outcome: Outcome = "running",
    ) -> RunStatus:
        """The state at ``progress``, which is between two steps."""
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
            values=dict(self._values),
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


class _LogLines:
    """Lines in the log; on standard error where the log would not show them."""

    refresh_seconds = 10.0
    epoch_refresh_seconds = 0.0  # each epoch has its line

    def open(self, status: RunStatus) -> None:
        """Nothing has happened yet."""

    def show(self, status: RunStatus) -> None:
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info("%s", status)
        else:
            print(status, file=sys.stderr, flush=True)

    def close(self, status: RunStatus | None) -> None:
        if status is not None:
            self.show(status)


def _display(plain: bool) -> _Display:
    if not plain:
        # Takes 50 ms to import, which a run without a terminal, or without a bar, need not wait.
        from robo_orchard_lab.pipeline.hooks._terminal_bar import TerminalBar, find_terminal

        terminal = find_terminal()
        if terminal is not None:
            return TerminalBar(terminal)
    return _LogLines()
