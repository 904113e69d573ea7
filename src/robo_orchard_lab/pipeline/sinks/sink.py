"""MetricsSink protocol, its configuration, and a fault-tolerant group of sinks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord

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
