"""Named scalars of a run: published by hooks, reduced at logging points, told to who asks."""

from robo_orchard_lab.pipeline.metrics.board import MetricsBoard
from robo_orchard_lab.pipeline.metrics.deferred import DeferredMetrics, resolve
from robo_orchard_lab.pipeline.metrics.errors import MetricValueError, UnknownMetricError
from robo_orchard_lab.pipeline.metrics.record import MetricsRecord, MetricValue, number_text
from robo_orchard_lab.pipeline.metrics.window import Reduction, WeightedSum

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
