"""MetricsSink protocol, its configuration, and a fault-tolerant group of sinks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue, number_text
from robo_orchard_lab.pipeline.progress import TrainerProgress

logger = logging.getLogger(__name__)


@runtime_checkable
class MetricsSink(Protocol):
    """Destination of metric records, used on the main process only.

    An error of ``open`` ends the run before its first step. An error of ``write`` or ``close`` is
    logged once; the sink gets no more records, and training continues.
    """

    def open(self, args: PipelineHookArgs) -> None:
        """Open the sink; the run starts or resumes at ``args.progress``."""
        ...

    def write(self, record: MetricsRecord) -> None:
        """Write the record of a logging point, or the partial record at the end of the run."""
        ...

    def close(self) -> None:
        """Close the sink at the end of the run, also after an error."""
        ...


SinkT_co = TypeVar("SinkT_co", bound=MetricsSink, covariant=True)


class SinkConfig(ClassConfig[SinkT_co], Generic[SinkT_co]):
    """Configuration of a sink; calling it builds the sink.

    ``class_type`` names the class, ``SinkConfig[MySink]`` declares its type.
    """


class SinkGroup:
    """Group of sinks; a failing sink is logged once and dropped.

    Args:
        sinks: sinks by name, for error messages.
        owner: name of the owner of the sinks, for error messages.
    """

    def __init__(self, sinks: Mapping[str, MetricsSink], owner: str) -> None:
        self._sinks = dict(sinks)
        self._owner = owner
        self._open: dict[str, MetricsSink] = {}

    def open(self, args: PipelineHookArgs) -> None:
        """Open all sinks; after a failure, close the others.

        Raises:
            Exception: the error of the sink, with a note that names the sink.
        """
        for name, sink in self._sinks.items():
            try:
                sink.open(args)
            except BaseException as error:
                error.add_note(f"{self._owner} could not open {name!r}")
                self.close()
                raise
            self._open[name] = sink

    def write(self, record: MetricsRecord) -> None:
        """Write a record to all open sinks."""
        for name, sink in [*self._open.items()]:
            if not self._succeeds(name, partial(sink.write, record)):
                del self._open[name]
                self._succeeds(name, sink.close, report=False)

    def close(self) -> None:
        """Close all open sinks."""
        while self._open:
            name, sink = self._open.popitem()
            self._succeeds(name, sink.close)

    def _succeeds(self, name: str, do: Callable[[], None], report: bool = True) -> bool:
        try:
            do()
        except Exception as error:
            if report:
                logger.error(
                    "%s drops %r, which failed with %s: %s; training continues without it",
                    *(self._owner, name, type(error).__name__, error),
                    exc_info=error,
                )
            return False
        return True


# --- Sink that writes to the log -----------------------------------------------------------------


class LogSink:
    """Sink to the log: a line per record at level INFO.

    The epoch counts from 1; the step is the number of completed steps. Values of earlier steps are
    marked with their step.

    >>> from robo_orchard_lab.pipeline.context import PipelineRun
    >>> run, sink = PipelineRun.standalone(), LogSink(names=["loss/*"])
    >>> sink.open(PipelineHookArgs(run))
    >>> loss, rate = MetricValue("loss/total", 0.42314, 50), MetricValue("lr/group0", 1e-4, 50)
    >>> print(sink.line(MetricsRecord(0, 50, 50, (loss, rate))))
    epoch 1, step 50: loss/total 0.4231

    Args:
        names: names of the metrics to log, or patterns such as ``loss/*``; None logs all. A record
            without any of the metrics gets no line.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._names = names
        self._progress = TrainerProgress()

    def open(self, args: PipelineHookArgs) -> None:
        self._progress = args.progress

    def write(self, record: MetricsRecord) -> None:
        line = self.line(record)
        if line:
            logger.info("%s", line)

    def close(self) -> None: ...

    def line(self, record: MetricsRecord) -> str:
        """Return the line of a record, or "" if no metric is selected."""
        shown = [value for value in record.values if self._is_shown(value)]
        if not shown:
            return ""
        # At the end of an epoch the counter has advanced; at the start, no epoch is done.
        epoch = max(1, record.epoch_id + (self._progress.step_id > 0))
        parts = [
            f"{value.name} {number_text(value.value)}"
            + (f" (step {value.step})" if value.step != record.global_step_id else "")
            for value in shown
        ]
        return f"epoch {epoch}, step {record.global_step_id}: {', '.join(parts)}"

    def _is_shown(self, value: MetricValue) -> bool:
        return self._names is None or any(fnmatchcase(value.name, name) for name in self._names)


class LogSinkConfig(SinkConfig[LogSink]):
    """Configuration of a :class:`LogSink`.

    >>> isinstance(LogSinkConfig(names=["loss/*", "eval/*"])(), LogSink)
    True
    """

    class_type: type[LogSink] = LogSink
    names: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names of the metrics to log, or patterns such as 'loss/*'; default: all.",
    )
