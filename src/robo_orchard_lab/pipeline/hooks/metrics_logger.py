"""Make the logging points, and hand what they find to sinks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import TypeAlias

from pydantic import Field

from robo_orchard_core.utils.config import ConfigInstanceOf
from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.sinks import MetricsSink, SinkConfig, SinkGroup
from robo_orchard_lab.pipeline.trigger import TriggerField

SinkLike: TypeAlias = MetricsSink | SinkConfig[MetricsSink]
"""A sink, or the configuration that builds one."""


class MetricsLogger(PipelineHooks):
    """Makes a logging point by a schedule, and writes what was published to each of its sinks.

    A logging point costs one packed transfer from the device and, with several processes, one
    packed collective, whatever the number of metrics; between them nothing is read. Every rank
    takes part in it; the main process alone opens the sinks and writes.

    What was published after the last logging point is written when the run ends, as a partial
    record: at a limit as by a request to stop, but not by an error. It stays in the run's state as
    well. A run that goes on from there has it in its next record, and the file of a
    ``JsonLinesSink`` is then that of an uninterrupted run.

    A sink that can't be opened is an error at the start of the run. One that fails later is
    reported once and dropped.

    >>> from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig
    >>> sinks = {"file": JsonLinesSinkConfig(), "log": LogSinkConfig(names=["loss/*"])}
    >>> MetricsLoggerConfig(every="100 steps | 1 epoch", sinks=sinks)().name
    'MetricsLogger'

    Args:
        cfg: when to log, and where.
        sinks: more sinks, live or by their configurations, with or without names.

    Raises:
        PipelineConfigError: a sink can't be built, or two have one name.
    """

    keeps_trajectory = True

    def __init__(
        self,
        cfg: MetricsLoggerConfig,
        *,
        sinks: Mapping[str, SinkLike] | Iterable[SinkLike] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.sinks: dict[str, MetricsSink] = {}
        """The sinks by the names that they are reported by."""
        for name, sink in (*_pairs(cfg.sinks), *_pairs(sinks or ())):
            self._add(name, sink)
        self._group: SinkGroup | None = None
        self._handle: RemovableHandle | None = None
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._open, after=self._close)
        )
        self.register_at_commit(self._ask, cfg.every)

    def _add(self, name: str | None, sink: SinkLike) -> None:
        built = self._built(name, sink) if isinstance(sink, SinkConfig) else sink
        if not all(callable(getattr(built, part, None)) for part in ("open", "write", "close")):
            raise PipelineConfigError(
                f"{self.name}.sinks: a sink has open(args), write(record) and close(); "
                f"got {type(built).__name__}"
            )
        if name is None:
            kind = type(built).__name__
            names = (kind if number == 1 else f"{kind} {number}" for number in count(1))
            name = next(free for free in names if free not in self.sinks)
        elif name in self.sinks:
            raise PipelineConfigError(
                f"{self.name}: two of its sinks are named {name!r}; give one of them another name"
            )
        self.sinks[name] = built

    def _built(self, name: str | None, config: SinkConfig[MetricsSink]) -> MetricsSink:
        try:
            return config()
        except PipelineConfigError as error:
            where = "" if name is None else f"[{name!r}]"
            raise PipelineConfigError(f"{self.name}.sinks{where}: {error}") from error

    def _open(self, args: PipelineHookArgs) -> None:
        if args.accelerator.is_main_process:
            group = SinkGroup(self.sinks, self.name)
            group.open(args)
            self._group = group
        # On every rank, so that all know alike that there are logging points.
        self._handle = args.metrics.listen(self._write)

    def _ask(self, args: PipelineHookArgs) -> None:
        args.requests.log("by its schedule", by=self.name)

    def _write(self, record: MetricsRecord) -> None:
        if self._group is not None:
            self._group.write(record)

    def _close(self, args: PipelineHookArgs) -> None:
        handle, self._handle = self._handle, None
        group, self._group = self._group, None
        if handle is not None:
            handle.remove()
        if group is not None:
            group.close()


class MetricsLoggerConfig(PipelineHooksConfig[MetricsLogger]):
    """When to log, and where.

    With no sinks there are logging points all the same, for the progress bar and for hooks that
    wait for a metric.

    >>> print(MetricsLoggerConfig().every)
    50 steps | 1 epoch
    """

    class_type: type[MetricsLogger] = MetricsLogger
    every: TriggerField = Field(
        default="50 steps | 1 epoch",
        description="When to make a logging point, such as '100 steps | 1 epoch | 10 min'.",
    )
    sinks: (
        Mapping[str, ConfigInstanceOf[SinkConfig[MetricsSink]]]
        | Sequence[ConfigInstanceOf[SinkConfig[MetricsSink]]]
    ) = Field(
        default=[],
        description="Where to write; a mapping gives the sinks names to be reported by.",
    )


def _pairs(
    sinks: Mapping[str, SinkLike] | Iterable[SinkLike],
) -> list[tuple[str | None, SinkLike]]:
    """The sinks with their names, if they have some."""
    if isinstance(sinks, Mapping):
        return [*sinks.items()]
    return [(None, sink) for sink in sinks]
