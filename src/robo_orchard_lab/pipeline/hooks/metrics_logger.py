"""Hook that triggers logging points and writes their records to sinks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias

import torch
from pydantic import Field

from robo_orchard_core.utils.config import ConfigInstanceOf
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import HookLike, PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.loss_tracker import LossTrackerConfig
from robo_orchard_lab.pipeline.hooks.progress_bar import ProgressBarHookConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.run.durable import set_aside
from robo_orchard_lab.pipeline.sinks import (
    LogSink,
    MetricsFileError,
    MetricsSink,
    SinkConfig,
    SinkGroup,
)
from robo_orchard_lab.pipeline.sinks.jsonl import from_line, to_line
from robo_orchard_lab.pipeline.sinks.sink import counters_of
from robo_orchard_lab.pipeline.state_schema import errors_of
from robo_orchard_lab.pipeline.trigger import TriggerField

logger = job_logger(__name__)

SinkLike: TypeAlias = MetricsSink | SinkConfig[MetricsSink]
"""A sink, or the config of a sink."""


class MetricsLogger(PipelineHooks):
    """Logging points on a trigger, written to sinks.

    At the end of a run, values published since the last logging point are written as a partial
    record, except after an error. They stay in the run's state, too: the next record of a resumed
    run contains them, and the file of a ``JsonLinesSink`` equals that of an uninterrupted run.

    A sink that can't be opened is an error at the start of the run. A sink that can't write later,
    as on a full disk, is reported once; its records are kept, also in checkpoints, and written when
    there is room. A sink with another error is reported once and dropped.

    - Ranks: all take part in a logging point; the main process opens the sinks and writes.
    - Requests: logging points.
    - State: in that of the metrics board: unwritten values and records, and the last record's step.
    - Cost: per logging point, one packed transfer from the device and, with several processes, one
      packed collective.

    >>> from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig
    >>> sinks = {"file": JsonLinesSinkConfig(), "log": LogSinkConfig(names=["loss/*"])}
    >>> MetricsLoggerConfig(every="100 steps | 1 epoch", sinks=sinks)().name
    'MetricsLogger'

    Args:
        cfg: trigger and sinks.
        sinks: more sinks or configs of sinks, optionally by name.

    Raises:
        PipelineConfigError: a sink can't be built, or two sinks have the same name.
    """

    keeps_trajectory = True
    reads = ("metrics",)
    changes = ()
    requests = ("log",)

    def __init__(
        self,
        cfg: MetricsLoggerConfig,
        *,
        sinks: Mapping[str, SinkLike] | Iterable[SinkLike] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.sinks: dict[str, MetricsSink] = {}
        """Sinks by the names used in reports."""
        self._newest: tuple[int, int] | None = None  # epoch and step of the last record
        self._unwritten: dict[str, list[MetricsRecord]] = {}  # by sink, while none is open
        for given in (cfg.sinks, sinks or ()):
            if isinstance(given, Mapping):
                for name, sink in given.items():
                    self._add(name, sink)
            else:
                for sink in given:
                    self._add(None, sink)
        if any(not isinstance(sink, LogSink) for sink in self.sinks.values()):
            self.declare_effects(changes=["files"])
        self.register_for_loop(self._open)
        reason = f"every {cfg.every}"
        self.register_at_commit(lambda args: args.requests.log(reason, self.name), cfg.every)

    def _add(self, name: str | None, sink: SinkLike) -> None:
        try:
            built = sink() if isinstance(sink, SinkConfig) else sink
        except PipelineConfigError as error:
            where = "" if name is None else f"[{name!r}]"
            raise PipelineConfigError(f"{self.name}.sinks{where}: {error}") from error
        kind = type(built).__name__
        if not all(callable(getattr(built, part, None)) for part in ("open", "write", "close")):
            raise PipelineConfigError(
                f"{self.name}.sinks: expected an object with open(args), write(record) and "
                f"close(), got {kind}"
            )
        if name is None:
            names = (kind if number == 1 else f"{kind} {number}" for number in count(1))
            name = next(free for free in names if free not in self.sinks)
        elif name in self.sinks:
            raise PipelineConfigError(
                f"{self.name}: two sinks are named {name!r}; rename one of them"
            )
        self.sinks[name] = built

    def _open(self, args: PipelineHookArgs) -> RemovableHandle:
        group = SinkGroup(self.sinks if args.accelerator.is_main_process else {}, self.name)

        def state() -> dict[str, Any]:
            """Flush the sinks, and return the records that they could not write."""
            return _encoded(self._newest, {**self._unwritten, **group.flush()})

        saved = args.metrics.add_writer(self.name, state)
        if saved:
            with errors_of(f"the saved state of {self.name}"):
                self._newest, self._unwritten = _decoded(saved)
        try:
            group.open(args)
        except MetricsFileError as error:
            if not saved or error.path is None:
                raise
            logger.warning("%s; the run moves the file to %s", error, set_aside(error.path))
            group.open(args)
        for name, sink in group.open_sinks():
            sink.restore(self._unwritten.pop(name, []), self._newest)

        def write(record: MetricsRecord) -> None:
            if not record.partial:
                self._newest = counters_of(record)
            group.write(record)

        # On every rank: all ranks must know that there are logging points.
        handles = [args.metrics.listen(write)]
        for name, write_media in group.media_writers().items():
            handles.append(args.report.attach(f"{self.name}, {name}", write_media))

        def close() -> None:
            for handle in handles:
                handle.remove()
            self._unwritten = group.close()

        return RemovableHandle(close)


def _encoded(
    newest: tuple[int, int] | None, unwritten: Mapping[str, Sequence[MetricsRecord]]
) -> dict[str, Any]:
    """Return a state for a checkpoint; lines of records as tensors, since JSON is bounded."""
    lines = {name: bytearray().join(map(to_line, records)) for name, records in unwritten.items()}
    return {
        "newest": newest,
        "unwritten": {n: torch.frombuffer(lines[n], dtype=torch.uint8) for n in lines if lines[n]},
    }


def _decoded(
    state: Mapping[str, Any],
) -> tuple[tuple[int, int] | None, dict[str, list[MetricsRecord]]]:
    """Return epoch and step of the newest record, and the unwritten records; ignore the rest."""
    newest, unwritten = None, {}
    match state.get("newest"):
        case (int(epoch), int(step)):
            newest = epoch, step
    match state.get("unwritten"):
        case dict(files):
            for name, lines in files.items():
                if isinstance(lines, torch.Tensor) and lines.dtype == torch.uint8:
                    found = map(from_line, lines.numpy().tobytes().splitlines())
                    unwritten[name] = [*filter(None, found)]
    return newest, unwritten


class MetricsLoggerConfig(PipelineHooksConfig[MetricsLogger]):
    """Trigger of logging points, and sinks.

    Logging points happen without sinks, too, for the progress bar and for hooks that subscribe to
    a metric.

    >>> print(MetricsLoggerConfig().every)
    50 steps | 1 epoch
    """

    class_type: type[MetricsLogger] = MetricsLogger
    every: TriggerField = Field(
        default="50 steps | 1 epoch",
        description="Trigger of logging points, such as '100 steps | 1 epoch | 10 min'.",
    )
    sinks: (
        Mapping[str, ConfigInstanceOf[SinkConfig[MetricsSink]]]
        | Sequence[ConfigInstanceOf[SinkConfig[MetricsSink]]]
    ) = Field(default=[], description="Sinks to write to; a mapping names the sinks in reports.")


def default_hooks() -> list[HookLike]:
    """Return the hooks of a trainer without hooks: progress, mean losses, and logging points.

    Pass the list with more hooks: ``hooks=[*default_hooks(), MyHook()]``.

    >>> [hook().name for hook in default_hooks()]
    ['ProgressBarHook', 'LossTracker', 'MetricsLogger']
    """
    return [ProgressBarHookConfig(), LossTrackerConfig(), MetricsLoggerConfig()]
