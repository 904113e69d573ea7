"""What a sink is, and its configuration."""

from __future__ import annotations

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
