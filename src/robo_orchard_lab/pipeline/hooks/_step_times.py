"""What the host's time goes into, from one step to the next."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun


class StepTimes(NamedTuple):
    """What some steps took in all, in seconds of the host."""

    steps: int
    samples: int
    data_s: float
    """Between two steps, without what was carried out at commit points."""
    compute_s: float
    """In the forward and backward pass and in the update."""
    hooks_s: float
    """In steps and updates otherwise."""

    @property
    def taken_s(self) -> float:
        """Everything."""
        return self.data_s + self.compute_s + self.hooks_s


class StepClock:
    """Adds up the times of steps; its methods are hooks.

    Each gives the time since the one before it to what it was spent on. A look at the clock takes
    0.05 us, and there are six in a step.
    """

    def __init__(self) -> None:
        self._run = PipelineRun()
        self._committed_s = self._marked_at = 0.0
        self._start_anew()

    def take(self) -> StepTimes:
        """What was added up; then it begins anew."""
        times = StepTimes(self._steps, self._samples, self._data_s, self._compute_s, self._hooks_s)
        self._start_anew()
        return times

    def _start_anew(self) -> None:
        self._steps = self._samples = 0
        self._data_s = self._compute_s = self._hooks_s = 0.0

    def begin_epoch(self, args: PipelineHookArgs) -> None:
        """The first batch is now waited for; what was before is given to nothing."""
        self._run = args.run
        self._committed_s = args.run.commit_seconds
        self._marked_at = perf_counter()

    def begin_step(self, args: PipelineHookArgs) -> None:
        """The batch is there."""
        now, committed_s = perf_counter(), self._run.commit_seconds
        self._data_s += now - self._marked_at - (committed_s - self._committed_s)
        self._committed_s = committed_s
        self._marked_at = now

    def begin_compute(self, args: PipelineHookArgs) -> None:
        """Hooks of the step, or of the update, were running until now."""
        now = perf_counter()
        self._hooks_s += now - self._marked_at
        self._marked_at = now

    def end_compute(self, args: PipelineHookArgs) -> None:
        """The device, or what drives it, was busy until now."""
        now = perf_counter()
        self._compute_s += now - self._marked_at
        self._marked_at = now

    def end_step(self, args: PipelineHookArgs) -> None:
        """The step is over, but for an update."""
        self._steps += 1
        self._samples += args.batch_size
        now = perf_counter()
        self._hooks_s += now - self._marked_at
        self._marked_at = now
