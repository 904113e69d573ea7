"""Metrics of a run: published by hooks, accumulated, reduced over ranks at logging points.

- ``board``: :class:`MetricsBoard`, where hooks publish and subscribe
- ``accumulators``: values, records and the accumulation of one metric
- ``exchange``: device-to-host copy and all_gather; :class:`DeferredMetrics`
- ``torchmetrics``, ``metric_states``: metrics of torchmetrics, reduced with all others
"""

from robo_orchard_lab.pipeline.errors import UnknownMetricError
from robo_orchard_lab.pipeline.metrics.accumulators import (
    MetricsRecord,
    MetricValue,
    MetricValueError,
    Reduction,
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
