"""Sinks of metrics: experiment trackers, a file of JSON lines, the log."""

from robo_orchard_lab.pipeline.sinks.jsonl import (
    JsonLinesSink,
    JsonLinesSinkConfig,
    MetricsFileError,
    read_metrics,
)
from robo_orchard_lab.pipeline.sinks.sink import (
    LogSink,
    LogSinkConfig,
    MetricsSink,
    SinkConfig,
    SinkGroup,
)
from robo_orchard_lab.pipeline.sinks.trackers import TrackerSink, TrackerSinkConfig

__all__ = [
    "JsonLinesSink",
    "JsonLinesSinkConfig",
    "LogSink",
    "LogSinkConfig",
    "MetricsFileError",
    "MetricsSink",
    "SinkConfig",
    "SinkGroup",
    "TrackerSink",
    "TrackerSinkConfig",
    "read_metrics",
]
