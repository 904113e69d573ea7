"""Hook that profiles a range of steps with torch.profiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.profiler import ProfilerAction, profile, record_function

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hook_times import with_ranges
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.pipeline.run.run_path import RunPath

logger = logging.getLogger(__name__)


class TorchProfilerHook(PipelineHooks):
    """Traces of a range of steps by torch.profiler, to view in Perfetto.

    >>> hook = TorchProfilerHookConfig(folder="traces", start_step=2, steps=2)()
    >>> hook.name  # writes traces/rank0/steps2-3.pt.trace.json
    'TorchProfilerHook'

    A step is recorded until the start of the next one, so with its update and the wait for the next
    batch. The trace has a range for each channel and each function of a hook, such as ``on_batch``
    and ``EMA on_optimizer_step.after``, around torch's operators. A run that ends or fails within
    the range writes the trace of its steps so far. A run resumed within the range records the rest.

    - Ranks: all; each writes to ``<folder>/rank<i>``.
    - State: none.
    - Cost: a comparison per step outside of the range; within the range, slower steps, and a device
      sync at its end. Errors of the profiler or in writing are logged; training continues.
    """

    keeps_trajectory = True
    reads = ()
    changes = ("files",)
    requests = ()

    def __init__(self, cfg: TorchProfilerHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._profiler: Any = None
        self._first_step = 0
        self._last_step = 0
        self._has_failed = False
        self._ranges = ExitStack()  # wrappers of channels while the profiler runs
        self.on_loop.after(self._close)
        self.on_step.before(self._step)

    def _step(self, args: PipelineHookArgs) -> None:
        """Start, continue or end the recording, before each step."""
        step, cfg = args.global_step_id, self.cfg
        if self._has_failed or step < cfg.start_step - cfg.warmup_steps:
            return
        if step >= cfg.start_step + cfg.steps:
            self._close(args)
        elif self._profiler is None:
            self._guarded(self._start, args)
        else:
            self._last_step = step
            self._guarded(self._profiler.step)

    def _start(self, args: PipelineHookArgs) -> None:
        is_running = getattr(torch.autograd, "_profiler_enabled", None)  # no public name
        if is_running is not None and is_running():
            raise RuntimeError("another profiler is running, and would be stopped by this one")
        cfg, step = self.cfg, args.global_step_id
        warmup = max(0, cfg.start_step - step)
        self._first_step, self._last_step = step + warmup, step
        run = args.run
        rank = Path(cfg.folder) / f"rank{args.accelerator.process_index}"
        self._profiler = profile(
            schedule=lambda count: (
                ProfilerAction.WARMUP if count < warmup else ProfilerAction.RECORD
            ),
            on_trace_ready=lambda profiler: self._write(profiler, rank, run),
            record_shapes=cfg.record_shapes,
            profile_memory=cfg.profile_memory,
            with_stack=cfg.with_stack,
        )
        self._profiler.start()
        for channel in CHANNEL_NAMES:
            wrapper = partial(with_ranges, channel, self, record_function)
            self._ranges.enter_context(self.get_channel(channel).wrap(wrapper))

    def _close(self, args: PipelineHookArgs) -> None:
        profiler, self._profiler = self._profiler, None
        self._ranges.close()
        if profiler is not None:
            self._guarded(profiler.stop)  # device sync; writes the trace

    def _write(self, profiler: Any, folder: Path, run: PipelineRun) -> None:
        path = folder / f"steps{self._first_step}-{self._last_step}.pt.trace.json"
        with TemporaryDirectory() as elsewhere:
            temporary = Path(elsewhere, path.name)
            profiler.export_chrome_trace(os.fspath(temporary))  # once; hides errors of writing
            trace = temporary.read_bytes() if temporary.exists() else b""
        if not trace.rstrip().endswith(b"}"):
            raise OSError(
                f"torch could not write the complete trace to {temporary}; make room there, or set "
                "TMPDIR to a folder with room"
            )
        if run.write_file(path, trace, self.name, is_required=False):
            logger.info("%s wrote %s", self.name, path)

    def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function; log an error and stop profiling."""
        try:
            function(*args)
        except Exception:  # a lost trace must not end the run
            logger.exception("%s: profiling failed; training continues", self.name)
            self._ranges.close()
            self._profiler = None
            self._has_failed = True


class TorchProfilerHookConfig(PipelineHooksConfig[TorchProfilerHook]):
    """Steps to record, and details of the recording.

    >>> TorchProfilerHookConfig(folder="traces", start_step=100, steps=3)().name
    'TorchProfilerHook'
    """

    class_type: type[TorchProfilerHook] = TorchProfilerHook
    folder: Annotated[str, RunPath()] = Field(
        description="Folder for traces, with a subfolder per rank."
    )
    start_step: int = Field(default=10, ge=0, description="First global step to record, from 0.")
    steps: int = Field(default=3, ge=1, description="Number of steps to record.")
    warmup_steps: int = Field(
        default=1,
        ge=0,
        description="Steps before the range on which the profiler runs without recording, to "
        "keep its start-up out of the trace.",
    )
    record_shapes: bool = Field(default=False, description="Record input shapes.")
    profile_memory: bool = Field(default=False, description="Record memory allocations.")
    with_stack: bool = Field(default=False, description="Record source lines; slow.")
