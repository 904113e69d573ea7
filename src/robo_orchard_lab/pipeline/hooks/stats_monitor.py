"""Publish how fast a run goes, what its time goes into, and what memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.errors import check_state_version
from robo_orchard_lab.pipeline.gradient_norm import gradient_norm
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.progress import remaining_steps
from robo_orchard_lab.pipeline.trigger import TriggerField

# --- step times ------------------------------------------------------------------------------
# What the host's time goes into, from one step to the next.


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


STATE_VERSION = 1
_MIB = 2**20
_MEMORY_EVERY_S = 1.0  # asking the system takes 50 us


class StatsMonitor(PipelineHooks):
    """Publishes at each logging point what was measured since the last one, on every rank.

    - ``perf/samples_per_s`` of all ranks, and ``perf/steps_per_s``
    - ``perf/data_s``, ``perf/compute_s``, ``perf/hooks_s``: what a step takes, in the mean, of
      waiting for its batch; of ``on_batch`` (forward and backward pass) and ``on_optimizer_step``;
      and of the rest of ``on_step``, which is hooks
    - ``perf/eta_s`` to the nearest limit, by what the steps of this loop took with all around them
    - ``perf/memory_mib`` and ``perf/device_memory_mib``: what the process takes, looked at once a
      second at most, and the most
      that tensors have taken of the device so far, on the rank where that is most
    - ``lr/group<i>``: the learning rate of the next update
    - ``grad_norm``: see ``grad_norm`` of the configuration

    Evaluations, logging points, saves and the ends of epochs are left out but for the ETA.
    Register it ahead of the hooks that it is to time: those around it count as waiting where they
    surround ``on_step``, and as hooks where they surround what is in it. A ``before`` of
    ``on_epoch`` inside of it counts as waiting, too.

    Times are the host's. A GPU works on behind: its time shows where the host next waits for it,
    such as in copying a batch, or in the update. It takes 2.3 us a step on a CPU, and once in a
    logging interval the norm of the gradients. Nothing is read from the device.

    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline import TrainerLimits
    >>> run = PipelineRun(accelerator=Accelerator(cpu=True), limits=TrainerLimits(max_step=9))
    >>> monitor = StatsMonitorConfig()()
    >>> args = PipelineHookArgs(run, batch=torch.zeros(8, 3))
    >>> with monitor.begin("on_loop", args):
    ...     with monitor.begin("on_epoch", args), monitor.begin("on_step", args):
    ...         pass
    ...     values = run.metrics.flush(log=True).values
    >>> [value.name for value in values][:2]
    ['perf/samples_per_s', 'perf/steps_per_s']
    """

    keeps_trajectory = True

    def __init__(self, cfg: StatsMonitorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._clock = StepClock()
        self._norm_due = cfg.grad_norm  # whether that of the next update is wanted
        self._has_norm = False  # whether it is this hook that publishes one
        self._run = PipelineRun()  # until the loop begins
        self._begun_at = 0.0
        self._first_step = 0
        self._steps_per_epoch: int | None = None
        self._before_logging: RemovableHandle | None = None
        self._process = psutil.Process()
        self._memory, self._memory_at = 0.0, -_MEMORY_EVERY_S
        clock = self._clock
        hook = HookContext.from_callable
        self.register_hook("on_loop", hook(self._begin_loop, self._end_loop))
        self.register_hook("on_epoch", hook(clock.begin_epoch, self._end_epoch))
        self.register_hook("on_step", hook(clock.begin_step, clock.end_step))
        self.register_hook("on_batch", hook(clock.begin_compute, clock.end_compute))
        self.register_hook("on_optimizer_step", hook(self._begin_update, self._end_update))
        if cfg.every is not None:
            self.register_at_commit(self._ask, cfg.every)

    def _begin_loop(self, args: PipelineHookArgs) -> None:
        self._run = args.run
        self._first_step = args.global_step_id
        self._steps_per_epoch = args.run.steps_per_epoch
        self._before_logging = args.metrics.before_logging(self._publish, self)
        self._begun_at = perf_counter()

    def _ask(self, args: PipelineHookArgs) -> None:
        args.requests.log("by its schedule", by=self.name)

    def _end_loop(self, args: PipelineHookArgs) -> None:
        if self._before_logging is not None:
            self._before_logging.remove()

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also where the data has no length

    def _begin_update(self, args: PipelineHookArgs) -> None:
        if self._norm_due:
            gradient_norm(args)  # which keeps it in args.grad_norm
        self._clock.begin_compute(args)

    def _end_update(self, args: PipelineHookArgs) -> None:
        self._clock.end_compute(args)
        if self._norm_due:
            self._norm_due = self.cfg.grad_norm_every_update
            self._publish_norm(args)

    def _publish_norm(self, args: PipelineHookArgs) -> None:
        """Unless another hook does, whose mean this would distort."""
        self._has_norm = self._has_norm or "grad_norm" not in args.metrics.names()
        if self._has_norm and args.grad_norm is not None:
            args.metrics.publish("grad_norm", args.grad_norm)

    def _publish(self) -> None:
        board, times = self._run.metrics, self._clock.take()
        if times.steps:
            board.publish("perf/samples_per_s", times.samples / times.taken_s, "sum")
            board.publish("perf/steps_per_s", times.steps / times.taken_s)
            for name in ("data_s", "compute_s", "hooks_s"):
                seconds = getattr(times, name) / times.steps
                board.publish(f"perf/{name}", seconds, weight=times.steps)
        self._publish_eta(board)
        self._publish_memory(board)
        groups = self._run.optimizer.param_groups if self._run.optimizer is not None else []
        for index, group in enumerate(groups):
            board.publish(f"lr/group{index}", group["lr"], "last")
        self._norm_due = self.cfg.grad_norm

    def _publish_eta(self, board: MetricsBoard) -> None:
        run = self._run
        done = run.progress.global_step_id - self._first_step
        window = run.accelerator.gradient_accumulation_steps
        left = remaining_steps(run.limits, run.progress, self._steps_per_epoch, window)
        if left is not None and done:
            board.publish("perf/eta_s", left * (perf_counter() - self._begun_at) / done, "max")

    def _publish_memory(self, board: MetricsBoard) -> None:
        now = perf_counter()
        if now >= self._memory_at + _MEMORY_EVERY_S:
            self._memory_at, self._memory = now, self._process.memory_info().rss / _MIB
        board.publish("perf/memory_mib", self._memory, "max")
        device = self._run.accelerator.device
        of_device = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
        if of_device is not None:  # the CPU has none
            board.publish("perf/device_memory_mib", of_device(device) / _MIB, "max")

    def state_dict(self) -> dict[str, Any]:
        """Which norms are to be published; times begin anew with another process."""
        return {
            "version": STATE_VERSION,
            "norm_due": self._norm_due,
            "has_norm": self._has_norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._norm_due = state["norm_due"]
        self._has_norm = state["has_norm"]


class StatsMonitorConfig(PipelineHooksConfig[StatsMonitor]):
    """When to measure, and what beside times, memory and learning rates.

    >>> StatsMonitorConfig(grad_norm=False)().name
    'StatsMonitor'
    """

    class_type: type[StatsMonitor] = StatsMonitor
    every: TriggerField | None = Field(
        default=None,
        description="When to make a logging point of its own, such as '50 steps'; None: it "
        "publishes at those that a MetricsLogger and other hooks make.",
    )
    grad_norm: bool = Field(
        default=True,
        description="Publish the norm of all gradients at the first update after each logging "
        "point, unless another hook, such as GradientClippingHook, publishes it for every update.",
    )
    grad_norm_every_update: bool = Field(
        default=False,
        description="Compute it for every update, which passes over all gradients once more; the "
        "mean is published.",
    )

    def __post_init__(self) -> None:
        if self.grad_norm_every_update and not self.grad_norm:
            raise ValueError("grad_norm_every_update=True needs grad_norm=True")
