"""Hook that measures the time of hooks, channels and stages; profile.json and trace.json.

``profile.json`` in the run folder has the times of this process in seconds::

    version        1
    steps          steps measured: all but the first, each until the next one begins
    step_seconds   median of the last 100 steps
    seconds        sum of all measured steps; equals the sum of total_s of all stages
    first_step_s   time of the first step
    stages         by name: total_s, step_s (mean of a step), median_s (of the last 100 steps),
                   share (of seconds)
    hooks          channel, position, hook, phase ("before" or "after"), calls, first_s (first
                   call), self_s and total_s (all other calls, without and with the channels opened
                   inside), share (of self_s in seconds)
    channels       channel, calls, self_s (without hooks and the channels opened inside), total_s
    device_idle    steps, mean_s and median_s: time of the device between two steps; with a device
    rank, ranks    rank of this document, and all of this for each rank

While the run is in progress, the file has the first rank only. After an error, each other rank
writes ``profile.rank<i>.json`` and ``trace.rank<i>.json``.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_core.utils.logging import aligned_lines, one_line
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hook_times import (
    COMMIT_STAGES,
    STAGES,
    Entry,
    HookTimes,
    Part,
    StepSpans,
    added_entry,
)
from robo_orchard_lab.pipeline.hooks.optimizer import NamedOptimizersHook, OptimizerHook
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES

logger = job_logger(__name__)

PROFILE_FILE = "profile.json"
TRACE_FILE = "trace.json"
_WRITE_EVERY_S = 30.0
_JUDGED_STEPS = 20  # fewer steps say little of a budget
_MOST_ROWS, _LONGEST_NAME = 15, 20


Share: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HookProfiler(PipelineHooks):
    """Times of all hooks and channels, and the stages of a step; where the time of a run goes.

    A hook's time is measured for each channel, before and after, with and without the channels
    opened inside; the first call apart. The stages share the time of a step: wait for data, forward
    pass, backward pass, optimizer, hooks, the trainer's own code, evaluation, logging and saving.
    Times are the host's: where the host waits for a device, the device's time is included.

    When the run ends, a table is logged, and ``profile.json`` and ``trace.json`` are written in the
    run folder. The trace has a window of steps in Chrome's format, to view in Perfetto, with the
    ranks as processes. Register the hook before the run, at any position: one that is added during
    the run publishes metrics, but reports nothing at the end.

    - Ranks: all; the main process logs, and writes the files of all ranks.
    - Publishes: median time in a step of the last 100 steps, in seconds, at each logging point:
      ``perf/hooks/<name>`` of each hook and ``perf/stages/<stage>``; with a device also
      ``perf/stages/device_idle``.
    - State: none.
    - Cost: 0.15 us for each function of a hook and 0.3 us for each channel in a step: 2 % of a tiny
      step, 5 % with ten more hooks. No device sync. One collective at the end of a run without
      errors. With a device, two events a step.

    >>> HookProfilerConfig(max_share={"EMA": 0.05}, trace_steps=0)().name
    'HookProfiler'
    """

    keeps_trajectory = True
    published_metrics = ("perf/hooks/*", "perf/stages/*")
    reads = ()
    changes = ("metrics", "files")
    requests = ()

    def __init__(self, cfg: HookProfilerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        first = cfg.trace_start_step + 1
        window = range(first, first + cfg.trace_steps)
        self._times = HookTimes(self._stage_of, window)
        self._idle: DeviceIdle | None = None
        self._run: PipelineRun | None = None
        self._warned: set[str] = set()
        self._written_at = time.monotonic()
        self._trace: list[dict[str, Any]] = []
        self.register_for_loop(self._begin)
        self.on_step.before(self._evaluate_if_full)
        for channel in CHANNEL_NAMES:
            self.get_channel(channel).wrap(partial(self._wrap, channel))

    def _wrap(self, channel: str, entries: Sequence[Entry]) -> Iterator[Entry]:
        """Return timed entries; the end of the loop follows the end of all hooks."""
        if channel == "on_loop":
            entries = [added_entry(None, self._finish, self), *entries]
        return self._times.wrap(channel, self, entries)

    def _stage_of(self, entry: Entry) -> str:
        updates = isinstance(entry.owner, OptimizerHook | NamedOptimizersHook)
        return "optimizer" if updates else "hooks"

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        run = self._run = args.run
        rank = args.accelerator.process_index
        if rank and run.folder is not None:
            for name in (PROFILE_FILE, TRACE_FILE):
                with suppress(OSError):
                    _of_rank(run.folder / name, rank).unlink()  # of a failed run before
        device = args.accelerator.device
        make_event = getattr(torch.get_device_module(device), "Event", None)
        if make_event is not None and device.type != "cpu" and self._idle is None:
            idle = self._idle = DeviceIdle(partial(make_event, enable_timing=True))
            step = added_entry(idle.begin_step, idle.end_step, self)
            evaluation = added_entry(idle.drop, None, self)
            self.get_channel("on_step").wrap(lambda entries: (step, *entries))
            self.get_channel("on_evaluation").wrap(lambda entries: (evaluation, *entries))
        markers = {
            (stage, is_begin): self._times.marker("enter" if is_begin else "exit", stage)
            for stage in COMMIT_STAGES
            for is_begin in (True, False)
        }

        def mark(stage: str, is_begin: bool) -> None:
            if self._idle is not None:
                self._idle.drop(args)
            markers[stage, is_begin](args)

        run.stage_listeners[self.name] = mark
        listening = args.metrics.before_logging(self._publish)

        def end() -> None:
            run.stage_listeners.pop(self.name, None)
            listening.remove()

        return RemovableHandle(end)

    def _evaluate_if_full(self, args: PipelineHookArgs) -> None:
        if self._run is None:
            self._begin(args)  # added during the run
        if self._times.is_full():
            self._times.evaluate(args.progress.steps_done)

    # --- reports -------------------------------------------------------------------------------

    def _publish(self) -> None:
        run, times = self._run, self._times
        assert run is not None  # set when the loop begins
        times.evaluate(run.progress.steps_done)
        for name, seconds in times.medians("hook").items():
            run.metrics.publish(f"perf/hooks/{name}", seconds)
        for name, seconds in times.medians("stage").items():
            run.metrics.publish(f"perf/stages/{name}", seconds)
        if self._idle is not None and (idle := self._idle.read()):
            run.metrics.publish("perf/stages/device_idle", median(idle))
        self._judge(run)
        now = time.monotonic()
        if now >= self._written_at + _WRITE_EVERY_S:
            self._written_at = now
            if run.accelerator.is_main_process:
                self._write(run, [self._profile(run)], {0: self._trace_events()})

    def _judge(self, run: PipelineRun) -> None:
        """Warn once of each hook beyond its budget."""
        budget, steps = self.cfg.max_share, self._times.steps
        seconds = self._times.sums("step").get("", 0.0)
        if budget is None or steps < _JUDGED_STEPS or not seconds:
            return
        spent = dict.fromkeys(
            (part.hook for part in self._times.parts if part.stage == "hooks"), 0.0
        )
        for part in self._times.parts:
            if part.hook in spent:
                spent[part.hook] += part.self_s
        names = [name for name in spent if name not in (None, self.name)]
        budgets = budget if isinstance(budget, dict) else dict.fromkeys(names, budget)
        for name, most in budgets.items():
            if name in self._warned:
                continue
            if name not in spent:
                advice = suggest_name(name, [str(known) for known in names], "hooks:")
                problem = f"no hook {name!r} has run; {advice}"
            elif spent[name] > most * seconds:
                problem = (
                    f"hook {name!r} takes {spent[name] / seconds:.1%} of a step "
                    f"({_time_text(spent[name] / steps)} of {_time_text(seconds / steps)}, mean of "
                    f"{steps:,} steps), more than its budget of {most:.1%}; run it less often, or "
                    "raise the budget"
                )
            else:
                continue
            self._warned.add(name)
            logger.warning("%s: %s", run.locate(self.name, "max_share"), problem)

    def _finish(self, args: PipelineHookArgs) -> None:
        """Report when the loop has ended for all hooks; a collective unless it failed."""
        run, rank = args.run, args.accelerator.process_index
        self._times.evaluate(args.progress.steps_done, at_end=True)
        if args.exception is None and args.requests.rollback_request is not None:
            return  # the loop begins again
        self._judge(run)
        mine = self._profile(run), self._trace_events()
        found = [mine]
        if args.exception is None and args.accelerator.num_processes > 1:
            found = gather_objects(mine)  # a collective
        profiles = [profile for profile, _ in found]
        if rank == 0 or args.exception is not None:
            first = profiles[0]["rank"]
            self._write(run, profiles, {first + i: events for i, (_, events) in enumerate(found)})
        if rank == 0:
            announce(logger, ProfileTable(self.name, profiles))

    def _trace_events(self) -> list[dict[str, Any]]:
        if self._times.recorded:
            offset = time.time() - time.perf_counter()
            self._trace += trace_events(self._times.recorded, offset)
            self._times.recorded.clear()
        return self._trace

    def _profile(self, run: PipelineRun) -> dict[str, Any]:
        """Return the document of this rank."""
        times = self._times
        seconds, sums = times.sums("step").get("", 0.0), times.sums("stage")
        medians, step = times.medians("stage"), times.medians("step")
        order = {name: number for number, name in enumerate((*CHANNEL_NAMES, *COMMIT_STAGES))}
        hooks = [part for part in times.parts if part.hook is not None and part.calls]
        hooks.sort(key=lambda p: (order[p.channel], p.position, p.phase != "before"))
        bodies = {part.channel: part.self_s for part in times.parts if part.phase == "body"}
        found: dict[str, Any] = {
            "version": 1,
            "rank": run.accelerator.process_index,
            "steps": times.steps,
            "step_seconds": step.get("", 0.0),
            "seconds": seconds,
            "first_step_s": times.first_step_s,
            "stages": {
                stage: {
                    "total_s": sums.get(stage, 0.0),
                    "step_s": sums.get(stage, 0.0) / max(1, times.steps),
                    "median_s": medians.get(stage, 0.0),
                    "share": _ratio(sums.get(stage, 0.0), seconds),
                }
                for stage in STAGES
            },
            "hooks": [
                {
                    **{"channel": part.channel, "position": part.position, "hook": part.hook},
                    **{"phase": part.phase, "calls": part.calls, "first_s": part.first_s},
                    **{"self_s": part.self_s, "total_s": part.total_s},
                    "share": _ratio(part.self_s, seconds),
                }
                for part in hooks
            ],
            "channels": [
                {
                    **{"channel": part.channel, "calls": part.calls},
                    "self_s": part.self_s + bodies[part.channel],
                    "total_s": part.total_s,
                }
                for part in sorted(times.parts, key=lambda part: order[part.channel])
                if part.phase is None and part.calls
            ],
        }
        if self._idle is not None and (idle := self._idle.read()):
            values = {"mean_s": fmean(idle), "median_s": median(idle)}
            found["device_idle"] = {"steps": len(idle), **values}
        return found

    def _write(
        self,
        run: PipelineRun,
        profiles: Sequence[dict[str, Any]],
        events: dict[int, list[dict[str, Any]]],
    ) -> None:
        """Write the documents of one rank or of all in the run folder."""
        if run.folder is None:
            return
        rank = profiles[0]["rank"]
        documents = {PROFILE_FILE: {**profiles[0], "ranks": profiles}}
        if any(events.values()):
            documents[TRACE_FILE] = trace_document(events)
        for name, document in documents.items():
            data = json.dumps(document, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            run.write_file(_of_rank(run.folder / name, rank), data, self.name, is_required=False)


class HookProfilerConfig(PipelineHooksConfig[HookProfiler]):
    """Budget of hooks, and window of the trace.

    >>> HookProfilerConfig(trace_start_step=100).trace_steps
    10
    """

    class_type: type[HookProfiler] = HookProfiler
    max_share: Share | dict[str, Share] | None = Field(
        default=0.02,
        description="Share of a step's time beyond which a hook gets a warning, once; or shares "
        "by the names of hooks; None for no warnings.",
    )
    trace_start_step: int = Field(
        default=10, ge=0, description="First global step of the trace, from 0."
    )
    trace_steps: int = Field(
        default=10, ge=0, le=1000, description="Number of steps in the trace; 0 for no trace."
    )


class DeviceIdle:
    """Time of a device between two steps, without commit points, by events on its queue.

    At most 64 pairs of events wait to be read; a step without a free pair is not measured.

    Args:
        make_event: returns an event with ``record``, ``query`` and ``elapsed_time``.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._free = [make_event() for _ in range(128)]
        self._end: Any = None
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds: deque[float] = deque(maxlen=1000)

    def end_step(self, args: PipelineHookArgs) -> None:
        """Record the end of a step's work; no device sync."""
        if len(self._free) > 1:
            self._end = self._free.pop()
            self._end.record()

    def begin_step(self, args: PipelineHookArgs) -> None:
        """Record the begin of a step's work; no device sync."""
        if self._end is not None:
            begin = self._free.pop()
            begin.record()
            self._pending.append((self._end, begin))
            self._end = None

    def drop(self, args: PipelineHookArgs) -> None:
        """Forget the end of the last step: other work follows."""
        if self._end is not None:
            self._free.append(self._end)
            self._end = None

    def read(self) -> list[float]:
        """Return the last times in seconds; no device sync, since only passed events are read."""
        while self._pending and self._pending[0][1].query():
            pair = self._pending.popleft()
            self._seconds.append(pair[0].elapsed_time(pair[1]) * 1e-3)
            self._free += pair
        return list(self._seconds)


class ProfileTable:
    """Table of stages and hooks in 80 columns.

    Args:
        name: name of the profiler.
        profiles: documents of all ranks.
    """

    def __init__(self, name: str, profiles: Sequence[dict[str, Any]]) -> None:
        self._name, self._profiles = name, profiles

    def __str__(self) -> str:
        first = self._profiles[0]
        if not first["steps"]:
            return f"{self._name}: no step after the first one to measure"
        mean = first["seconds"] / first["steps"]
        title = (
            f"{self._name}: {first['steps']:,} steps of {_time_text(mean)} (median "
            f"{_time_text(first['step_seconds'])}) after the first, which took "
            f"{_time_text(first['first_step_s'])}"
        )
        several = len(self._profiles) > 1
        stages = [("stage", "per step", "share", *(["slowest rank"] if several else []))]
        for stage, found in first["stages"].items():
            by_rank = [profile["stages"][stage]["step_s"] for profile in self._profiles]
            slowest = f"{_time_text(max(by_rank))} on {by_rank.index(max(by_rank))}"
            row = stage, _time_text(found["step_s"]), _share_text(found["share"])
            stages.append((*row, *([slowest] if several else [])))
        hooks = [("hook", "function", "calls", "first", "self", "total", "share")]
        by_cost = sorted(first["hooks"], key=lambda h: (h["self_s"], h["first_s"]), reverse=True)
        for hook in by_cost[:_MOST_ROWS]:
            calls = hook["calls"] - 1
            each = ("-", "-")
            if calls:
                each = _time_text(hook["self_s"] / calls), _time_text(hook["total_s"] / calls)
            place = f"{hook['channel']}.{hook['phase']}"
            name = one_line(hook["hook"])
            name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
            times = _time_text(hook["first_s"]), *each, _share_text(hook["share"])
            hooks.append((name, place, f"{hook['calls']:,}", *times))
        lines = [title, *aligned_lines(stages, left=1), *aligned_lines(hooks, left=2)]
        if len(by_cost) > _MOST_ROWS:
            lines.append(f"{len(by_cost) - _MOST_ROWS} more in {PROFILE_FILE}")
        return "\n".join(lines)


def _of_rank(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0


def _time_text(seconds: float) -> str:
    """Format a time with two digits or more.

    >>> _time_text(2.5e-6), _time_text(0.00041), _time_text(0.0325), _time_text(42.0)
    ('2.5us', '410us', '32ms', '42s')
    """
    factor, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")
    return f"{seconds * factor:.{0 if seconds * factor >= 9.95 else 1}f}{unit}"


def _share_text(share: float) -> str:
    """Format a share.

    >>> _share_text(0.008), _share_text(0.246)
    ('0.8%', '25%')
    """
    return f"{share:.{0 if share >= 0.0995 else 1}%}"


# trace.json, for Perfetto (https://ui.perfetto.dev) or chrome://tracing. In Chrome's trace event
# format, complete events (`ph` is `X`) have a begin `ts` and a duration `dur` in microseconds, and
# nest by time in a process `pid` and a thread `tid`.

_TICKS_PER_US = 64  # sums of `ts` and `dur` are exact in binary, so that spans nest exactly


def trace_events(steps: Sequence[StepSpans], clock_offset_s: float) -> list[dict[str, Any]]:
    """Return the events of one rank, without ``pid`` and ``tid``; the outer ones first.

    Args:
        steps: consecutive steps.
        clock_offset_s: the system's time minus that of ``perf_counter``, to align ranks.
    """
    events: list[dict[str, Any]] = []
    started: dict[Part, dict[str, Any]] = {}  # channels that outlast their first step

    def add(name: str, kind: str, start_s: float, end_s: float, **args: Any) -> dict[str, Any]:
        ts, end = (round((s + clock_offset_s) * 1e6 * _TICKS_PER_US) for s in (start_s, end_s))
        event = {"name": name, "cat": kind, "ph": "X", "ts": ts, "dur": end - ts, "args": args}
        events.append(event)
        return event

    for step, times, spans, owners in steps:
        last = len(times) - 1
        for part, start, end, _ in spans:
            if part.phase == "body" and part.stage in ("data_wait", "trainer"):
                continue  # as long as the channel, without its hooks
            open_event = started.pop(part, None)
            if open_event is not None and start == 0:
                now = round((times[end] + clock_offset_s) * 1e6 * _TICKS_PER_US)
                open_event["dur"] = now - open_event["ts"]
            else:
                name, kind, about = _described(part)
                open_event = add(name, kind, times[start], times[end], step=step, **about)
            if end == last:
                started[part] = open_event
        for interval, owner in enumerate(owners):
            if owner is not None and owner.stage == "data_wait":
                add("data_wait", "stage", *times[interval : interval + 2], step=step)
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    return events


def _described(part: Part) -> tuple[str, str, dict[str, Any]]:
    """Return the name, category and arguments of a part's events."""
    if part.hook is not None:
        about = {"channel": part.channel, "phase": part.phase, "position": part.position}
        return part.hook, "hook", about
    return (part.stage, "stage", {}) if part.phase == "body" else (part.channel, "channel", {})


def trace_document(events_by_rank: Mapping[int, Iterable[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return a trace with one process for each rank; the first event begins at 0."""
    ranks = {rank: list(events) for rank, events in events_by_rank.items()}
    begin = min((event["ts"] for events in ranks.values() for event in events), default=0)
    found: list[dict[str, Any]] = []
    for rank, events in ranks.items():
        place = {"pid": rank, "tid": 0}
        names = {"process_name": f"rank {rank}", "thread_name": "training"}
        found += [
            {"name": kind, "ph": "M", "ts": 0, **place, "args": {"name": name}}
            for kind, name in names.items()
        ]
        for event in events:
            ts, dur = (ticks / _TICKS_PER_US for ticks in (event["ts"] - begin, event["dur"]))
            found.append({**event, **place, "ts": ts, "dur": dur})
    return {"displayTimeUnit": "ns", "traceEvents": found}
