"""Sink to the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue, number_text
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.sinks.sink import SinkConfig

logger = logging.getLogger(__name__)


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
