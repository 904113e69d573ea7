"""What a sink is, and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord


@runtime_checkable
class MetricsSink(Protocol):
    """Where the records of a run go; opened on the main process only.

    What ``open`` raises ends the run before its first step. What ``write`` or ``close`` raises is
    reported once; the sink then gets no more records, and training goes on.
    """

    def open(self, args: PipelineHookArgs) -> None:
        """The run begins, or goes on, at ``args.progress``."""
        ...

    def write(self, record: MetricsRecord) -> None:
        """Take the record of a logging point, or the partial one at the end of the run."""
        ...

    def close(self) -> None:
        """The run has ended, also by an error."""
        ...


SinkT_co = TypeVar("SinkT_co", bound=MetricsSink, covariant=True)


class SinkConfig(ClassConfig[SinkT_co], Generic[SinkT_co]):
    """The parameters of a sink; calling it builds the sink.

    ``class_type`` names the class, ``SinkConfig[MySink]`` declares its type.
    """


# --- group -----------------------------------------------------------------------------------
# Several sinks as one, none of which can end a run.


logger = logging.getLogger(__name__)


class SinkGroup:
    """Hands each record to several sinks.

    One that fails while the run goes on is reported once, by its name, and dropped. One that can't
    be opened is an error, and those that were opened before it are closed.

    Args:
        sinks: by the names that they are reported by.
        owner: whose sinks they are, for the report.
    """

    def __init__(self, sinks: Mapping[str, MetricsSink], owner: str) -> None:
        self._sinks = dict(sinks)
        self._owner = owner
        self._open: dict[str, MetricsSink] = {}

    def open(self, args: PipelineHookArgs) -> None:
        """Open every one.

        Raises:
            Exception: what a sink raises, with a note that names it.
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
        """Hand a record to every one that has not failed."""
        for name, sink in [*self._open.items()]:
            if not self._works(name, partial(sink.write, record)):
                del self._open[name]
                self._works(name, sink.close, report=False)

    def close(self) -> None:
        """Close every one that has not failed."""
        while self._open:
            name, sink = self._open.popitem()
            self._works(name, sink.close)

    def _works(self, name: str, do: Callable[[], None], report: bool = True) -> bool:
        try:
            do()
        except Exception as error:
            if report:
                logger.error(
                    "%s drops %r, which failed with %s: %s; training goes on without it",
                    *(self._owner, name, type(error).__name__, error),
                    exc_info=error,
                )
            return False
        return True
