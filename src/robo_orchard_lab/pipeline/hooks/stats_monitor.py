"""Hook that publishes speed, step times, memory use and learning rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import check_state_version
from robo_orchard_lab.pipeline.gradient_norm import gradient_norm
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import remaining_steps
from robo_orchard_lab.pipeline.state_schema import Flag, StateSchema, Text
from robo_orchard_lab.pipeline.trigger import TriggerField

STATE_VERSION = 1
_PERF = (
    *("samples_per_s", "steps_per_s", "data_s", "compute_s", "hooks_s", "eta_s"),
    *("memory_mib", "device_memory_mib"),
)
_MIB = 2**20
_MEMORY_EVERY_S = 1.0  # querying the system costs 50 us


class StatsMonitor(PipelineHooks):
    """Speed, step times, memory use and learning rates at each logging point.

    - Ranks: all.
    - Publishes:

      - ``perf/samples_per_s`` of all ranks, and ``perf/steps_per_s``
      - ``perf/data_s``, ``perf/compute_s``, ``perf/hooks_s``: mean seconds per step of the wait for
        the batch; of ``on_batch`` and ``on_optimizer_step``; of the rest of ``on_step``
      - ``perf/eta_s``: seconds to the nearest limit, by the mean time of a step, all included
      - ``perf/memory_mib``: memory of the process, read at most once a second
      - ``perf/device_memory_mib``: peak of tensors on the device; the largest over ranks
      - ``lr/group<i>``: learning rate of the next update; with several optimizers
        ``lr/<optimizer>``, or ``lr/<optimizer>/group<i>`` if it has several groups
      - ``grad_norm``: see the config; with several optimizers ``grad_norm/<optimizer>``
    - Requests: with ``every``, logging points.
    - State: pending norms; times start again.
    - Cost: 2 us a step on a CPU, and one gradient norm per logging interval; no device sync.

    Except for the ETA, evaluations, logging points, saves and the ends of epochs are not counted.
    Register the hook before the hooks to time: outer hooks count as waiting on ``on_step``. Times
    are the host's: a GPU's time shows where the host next waits for the device, such as in copying
    a batch or in the update.

    >>> run, monitor = PipelineRun.standalone(), StatsMonitorConfig()()
    >>> args = PipelineHookArgs(run, batch=torch.zeros(8, 3))
    >>> with monitor.begin("on_loop", args):
    ...     with monitor.begin("on_epoch", args), monitor.begin("on_step", args):
    ...         pass
    ...     values = run.metrics.flush(log=True).values
    >>> [value.name for value in values][:2]
    ['perf/samples_per_s', 'perf/steps_per_s']
    """

    keeps_trajectory = True
    reads = ("batch_size", "learning rates")
    changes = ("metrics",)
    requests = ()

    def __init__(self, cfg: StatsMonitorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.grad_norm:
            self.declare_effects(reads=["gradients", "grad_norm"])
            self.declare_effects(changes=["grad_norm"])
        if cfg.every is not None:
            self.declare_effects(requests=["log"])
        # By optimizer: publish the norm of the next update; this hook publishes the norm.
        self._norm_due: dict[str, bool] = defaultdict(lambda: cfg.grad_norm)
        self._are_norms_due = True  # of any optimizer
        self._has_norm: dict[str, bool] = defaultdict(bool)
        self._run: PipelineRun  # set when the loop begins
        self._optimizers: list[str] = []  # names of several optimizers
        self._begun_at = 0.0
        self._first_step = 0
        self._steps_per_epoch: int | None = None
        self._window = 1  # steps in an accumulation window
        self._device_memory: Callable[[], int] | None = None  # peak, in bytes
        self._process = psutil.Process()
        self._memory, self._memory_at = 0.0, -_MEMORY_EVERY_S
        self._step_at = 0.0  # begin of the step, or of the rest of the step
        self._ended_at = 0.0  # end of the step, on a clock that stops at commit points
        self._is_in_batch = False
        self._reset_times()
        hook = HookContext.from_callable
        self.register_for_loop(self._begin_loop)
        self.register_hook("on_epoch", hook(self._begin_epoch, self._end_epoch))
        self.register_hook("on_step", hook(self._begin_step, self._end_step))
        self.register_hook("on_batch", hook(self._begin_compute, self._end_compute))
        self.register_hook("on_optimizer_step", hook(self._begin_update, self._end_update))
        if cfg.every is not None:
            reason = f"every {cfg.every}"
            self.register_at_commit(lambda args: args.requests.log(reason, self.name), cfg.every)

    @property
    def published_metrics(self) -> Sequence[str]:  # type: ignore[override]  # read-only here
        times = [f"perf/{name}" for name in _PERF]
        if not self._optimizers:
            return [*times, "lr/group*", *(["grad_norm"] if self.cfg.grad_norm else [])]
        norms = [f"grad_norm/{name}" for name in self._optimizers if self.cfg.grad_norm]
        return [*times, *norms, *(f"lr/{n}{end}" for n in self._optimizers for end in ("", "/*"))]

    def _reset_times(self) -> None:
        """Reset the host times, in seconds, since the last logging point."""
        self._steps = self._samples = 0
        self._data_s = 0.0  # between two steps, without commit points: the wait for batches
        self._step_s = 0.0  # steps
        self._compute_s = 0.0  # forward and backward passes, and updates

    def _begin_loop(self, args: PipelineHookArgs) -> RemovableHandle:
        self._run = args.run
        self._optimizers = args.run.optimizer_names
        self._first_step = args.global_step_id
        self._steps_per_epoch = args.run.steps_per_epoch
        self._window = args.accelerator.gradient_accumulation_steps
        device = args.accelerator.device
        peak = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
        self._device_memory = None if peak is None else partial(peak, device)  # not on a CPU
        self._begun_at = perf_counter()
        return args.metrics.before_logging(self._publish, self)

    # A stage adds the clock at its end and subtracts the clock at its begin. Reading the clock
    # costs 0.05 us, six times a step.

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        self._ended_at = perf_counter() - args.run.commit_seconds

    def _begin_step(self, args: PipelineHookArgs) -> None:
        self._step_at = now = perf_counter()
        self._data_s += now - self._run.commit_seconds - self._ended_at

    def _begin_compute(self, args: PipelineHookArgs) -> None:
        self._compute_s -= perf_counter()
        self._is_in_batch = True

    def _end_compute(self, args: PipelineHookArgs) -> None:
        self._compute_s += perf_counter()
        self._is_in_batch = False

    def _end_step(self, args: PipelineHookArgs) -> None:
        self._steps += 1
        self._samples += args.batch_size
        now = perf_counter()
        self._step_s += now - self._step_at
        self._step_at = now
        self._ended_at = now - self._run.commit_seconds

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            self._steps_per_epoch = args.step_id  # exact, also for data without a length

    def _begin_update(self, args: PipelineHookArgs) -> None:
        if self._are_norms_due and self._norm_due[args.optimizer_name or ""]:
            gradient_norm(args)  # stored in args.grad_norm
        if not self._is_in_batch:  # else a named step of several optimizers, counted as compute
            self._compute_s -= perf_counter()

    def _end_update(self, args: PipelineHookArgs) -> None:
        if not self._is_in_batch:
            # The outermost hook makes the update after the step's other hooks.
            now = perf_counter()
            self._compute_s += now
            self._step_s += now - self._step_at
            self._step_at = now
            self._ended_at = now - self._run.commit_seconds
        if not self._are_norms_due:
            return
        owner = args.optimizer_name or ""
        if self._norm_due[owner]:
            self._norm_due[owner] = self.cfg.grad_norm_every_update
            # Another hook may publish the mean over all updates.
            name = args.metric_name("grad_norm")
            self._has_norm[owner] = self._has_norm[owner] or name not in args.metrics.names()
            if self._has_norm[owner] and args.grad_norm is not None:
                args.metrics.publish(name, args.grad_norm)
        is_first = len(self._norm_due) < len(self._run.optimizers)
        self._are_norms_due = is_first or any(self._norm_due.values())

    def _publish(self) -> None:
        board, steps = self._run.metrics, self._steps
        if steps:
            stages = {
                "data_s": self._data_s,
                "compute_s": self._compute_s,
                "hooks_s": max(0.0, self._step_s - self._compute_s),
            }
            total_s = sum(stages.values())
            board.publish("perf/samples_per_s", self._samples / total_s, "sum")
            board.publish("perf/steps_per_s", steps / total_s)
            for name, seconds in stages.items():
                board.publish(f"perf/{name}", seconds / steps, weight=steps)
        self._reset_times()
        self._publish_eta(board)
        self._publish_memory(board)
        for owner, optimizer in self._run.optimizers.items():
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                name = f"lr/group{index}"
                if owner:
                    name = f"lr/{owner}" if len(groups) == 1 else f"lr/{owner}/group{index}"
                board.publish(name, group["lr"], "last")
        self._norm_due.clear()
        self._are_norms_due = True

    def _publish_eta(self, board: MetricsBoard) -> None:
        run = self._run
        done = run.progress.global_step_id - self._first_step
        left = remaining_steps(run.limits, run.progress, self._steps_per_epoch, self._window)
        if left is not None and done:
            board.publish("perf/eta_s", left * (perf_counter() - self._begun_at) / done, "max")

    def _publish_memory(self, board: MetricsBoard) -> None:
        now = perf_counter()
        if now >= self._memory_at + _MEMORY_EVERY_S:
            self._memory_at, self._memory = now, self._process.memory_info().rss / _MIB
        board.publish("perf/memory_mib", self._memory, "max")
        if self._device_memory is not None:
            board.publish("perf/device_memory_mib", self._device_memory() / _MIB, "max")

    state_schema = StateSchema(
        STATE_VERSION,
        optional=["optimizers"],
        norm_due=Flag,
        has_norm=Flag,
        optimizers=dict[Text, tuple[Flag, Flag]],
    )

    def state_dict(self) -> dict[str, Any]:
        state = {"version": STATE_VERSION, "norm_due": self._norm_due[""]}
        state["has_norm"] = self._has_norm[""]
        names = [name for name in {**self._norm_due, **self._has_norm} if name]
        named = {name: (self._norm_due[name], self._has_norm[name]) for name in names}
        return {**state, "optimizers": named} if named else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        flags = {"": (state["norm_due"], state["has_norm"]), **state.get("optimizers", {})}
        self._norm_due.update((name, due) for name, (due, _) in flags.items())
        self._has_norm.update((name, has_norm) for name, (_, has_norm) in flags.items())


class StatsMonitorConfig(PipelineHooksConfig[StatsMonitor]):
    """Trigger of logging points, and publication of gradient norms.

    >>> StatsMonitorConfig(grad_norm=False)().name
    'StatsMonitor'
    """

    class_type: type[StatsMonitor] = StatsMonitor
    every: TriggerField | None = Field(
        default=None,
        description="Trigger of additional logging points, such as '50 steps'; None to use "
        "the logging points of a MetricsLogger or other hooks.",
    )
    grad_norm: bool = Field(
        default=True,
        description="Publish the norm of all gradients at the first update after each logging "
        "point, unless another hook (GradientClippingHook) publishes it for every update.",
    )
    grad_norm_every_update: bool = Field(
        default=False,
        description="Publish the mean norm over all updates; costs a pass over all gradients "
        "per update.",
    )

    def __post_init__(self) -> None:
        if self.grad_norm_every_update and not self.grad_norm:
            raise ValueError("grad_norm_every_update=True needs grad_norm=True")
