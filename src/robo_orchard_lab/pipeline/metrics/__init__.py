"""Named scalars of a run: published by hooks, reduced at logging points, told to who asks."""

from robo_orchard_lab.pipeline.metrics.accumulators import (
    MetricsRecord,
    MetricValue,
    MetricValueError,
    Reduction,
    UnknownMetricError,
    WeightedSum,
    number_text,
)
from robo_orchard_lab.pipeline.metrics.board import MetricsBoard
from robo_orchard_lab.pipeline.metrics.exchange import DeferredMetrics, resolve

__all__ = [
    "DeferredMetrics",
    "MetricValue",
    "MetricValueError",
    "MetricsBoard",
    "MetricsRecord",
    "Reduction",
    "UnknownMetricError",
    "WeightedSum",
    "number_text",
    "resolve",
]
