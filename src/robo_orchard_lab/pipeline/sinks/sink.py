"""MetricsSink protocol, its configuration, and a fault-tolerant group of sinks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Generic, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.media import Receiver
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue, number_text
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import RetriedWrite

logger = logging.getLogger(__name__)


@runtime_checkable
class MetricsSink(Protocol):
    """Destination of metric records, used on the main process only.

    An error of ``open`` ends the run before its first step. An ``OSError`` of ``write``, as on a
    full disk, is logged once; the sink gets the record again with the next one. After another
    error of ``write``, or an error of ``close``, the sink gets no more records. Training continues.

    Three members are optional: ``flush()`` makes written records durable before a checkpoint is
    saved, ``newest_record`` is the newest record when the sink is opened, or None, and
    ``write_media(media)`` writes an image, a text or a table, see :class:`Media`.
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


MAX_UNWRITTEN = 10_000
"""Most records to keep for a sink that can't write; then the oldest ones are lost."""


class OpenSink:
    """Open sink with the records that it could not write yet."""

    def __init__(self, name: str, sink: MetricsSink, owner: str) -> None:
        self.sink = sink
        self.unwritten: list[MetricsRecord] = []
        path = getattr(sink, "path", None)
        self._what = repr(name) if path is None else f"{name!r} to {path}"
        self._writes = RetriedWrite(owner)
        self._lost = 0

    def write(self) -> None:
        """Write the unwritten records; after an ``OSError`` they are kept."""
        done = 0
        try:
            for record in self.unwritten:
                self.sink.write(record)
                done += 1
        except OSError as error:
            self._fail(error)
        finally:
            del self.unwritten[:done]
        while len(self.unwritten) > MAX_UNWRITTEN:
            del self.unwritten[0]
            self._lost += 1
        if not self.unwritten:
            lost = f", except {self._lost} older records" if self._lost else ""
            self._writes.succeeded(self._what + lost)
            self._lost = 0

    def restore(self, records: Sequence[MetricsRecord], newest: tuple[int, int] | None) -> None:
        """Write the unwritten records of the resumed run, and warn of records that are lost.

        Args:
            records: unwritten records; those that the sink has are ignored.
            newest: epoch and step of the run's newest record, or None.
        """
        last = counters_of(getattr(self.sink, "newest_record", None))
        missing = [record for record in records if counters_of(record) > last]
        if missing:
            self.unwritten += missing
            self.write()
            last = counters_of(missing[-1])
        if newest is not None and last < newest and hasattr(self.sink, "newest_record"):
            logger.warning(
                "%s: %s ends at step %d, but the resumed run had a record of step %d: the records "
                "after step %d are lost",
                *(self._writes.by, self._what, max(0, last[1]), newest[1], max(0, last[1])),
            )

    def flush(self) -> None:
        """Flush the written records, if the sink can."""
        flush = getattr(self.sink, "flush", None)
        if flush is not None and not self.unwritten:
            try:
                flush()
            except Exception as error:  # a lost flush must not end the run
                self._fail(error)

    def report_loss(self) -> None:
        """Report the records that a run leaves unwritten."""
        if self.unwritten:
            steps = [record.global_step_id for record in self.unwritten]
            logger.error(
                "%s: %d records of steps %d to %d were not written: %s",
                *(self._writes.by, self._lost + len(steps), steps[0], steps[-1], self._what),
            )

    def _fail(self, error: Exception) -> None:
        then = "the run continues, and writes the records later"
        self._writes.failed(f"writing {self._what}", error, then)


def counters_of(record: MetricsRecord | None) -> tuple[int, int]:
    """Return epoch and step of a record, by which records are ordered."""
    return (-1, -1) if record is None else (record.epoch_id, record.global_step_id)


class SinkGroup:
    """Group of sinks; a sink that can't write is logged once, and its records are kept.

    Args:
        sinks: sinks by name, for error messages.
        owner: name of the owner of the sinks, for error messages.
    """

    def __init__(self, sinks: Mapping[str, MetricsSink], owner: str) -> None:
        self._sinks = dict(sinks)
        self._owner = owner
        self._open: dict[str, OpenSink] = {}

    def open(self, args: PipelineHookArgs) -> None:
        """Open all sinks; after a failure, close the others.

        Raises:
            Exception: the error of the sink, with a note that names the sink.
        """
        for name, sink in self._sinks.items():
            if hasattr(sink, "reports_as"):  # a sink with a group of its own
                sink.reports_as = f"{self._owner}, {type(sink).__name__}"
            try:
                sink.open(args)
            except BaseException as error:
                error.add_note(f"{self._owner} could not open {name!r}")
                self.close()
                raise
            self._open[name] = OpenSink(name, sink, self._owner)

    def write(self, record: MetricsRecord) -> None:
        """Write a record to all open sinks, after the records that a sink could not write."""
        for name, each in [*self._open.items()]:
            each.unwritten.append(record)
            if not self._succeeds(name, each.write):
                del self._open[name]
                self._succeeds(name, each.sink.close, report=False)

    def flush(self) -> dict[str, list[MetricsRecord]]:
        """Flush all sinks; return the unwritten records of complete logging points, by sink."""
        found = {}
        for name, each in self.open_sinks():
            each.flush()
            if records := [record for record in each.unwritten if not record.partial]:
                found[name] = records
        return found

    def open_sinks(self) -> Iterator[tuple[str, OpenSink]]:
        """Iterate over the open sinks, those of inner groups included, by name."""
        for name, each in self._open.items():
            inner = getattr(each.sink, "group", None)
            if isinstance(inner, SinkGroup):
                yield from ((f"{name}/{key}", sink) for key, sink in inner.open_sinks())
            else:
                yield name, each

    def media_writers(self) -> dict[str, Receiver]:
        """Return the method that writes media of each open sink with such a method, by name."""
        return {
            name: each.sink.write_media
            for name, each in self.open_sinks()
            if hasattr(each.sink, "write_media")
        }

    def close(self) -> dict[str, list[MetricsRecord]]:
        """Close all open sinks; return the records that could not be written, by sink."""
        for name, each in self._open.items():
            self._succeeds(name, each.write)
        unwritten = self.flush()
        while self._open:
            name, each = self._open.popitem()
            each.report_loss()
            self._succeeds(name, each.sink.close)
        return unwritten

    def _succeeds(self, name: str, do: Callable[[], None], report: bool = True) -> bool:
        try:
            do()
        except Exception as error:  # a broken sink must not end the run
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

    >>> from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
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
            f"{one_line(value.name)} {number_text(value.value)}"
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
