"""Metrics as lines of the log."""

from __future__ import annotations

import logging
import math

import pydantic
import pytest

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.sinks import LogSink, LogSinkConfig

VALUES = (
    MetricValue("eval/val/accuracy", 0.97221, 145),
    MetricValue("loss/total", 0.42314, 150),
    MetricValue("lr/group0", 3e-4, 150),
    MetricValue("loss/box", math.nan, 150),
)


def line(sink: LogSink, record: MetricsRecord, step_in_epoch: int) -> str:
    run = PipelineRun.standalone()
    run.progress.step_id = step_in_epoch
    sink.open(PipelineHookArgs(run))
    return sink.line(record)


def test_record_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A line has the epoch, the step and every metric; older values have their step."""
    caplog.set_level(logging.INFO)
    sink = LogSink()
    sink.open(PipelineHookArgs())
    sink.write(MetricsRecord(2, 150, 75, VALUES))
    sink.close()
    assert caplog.messages == [
        "epoch 2, step 150: eval/val/accuracy 0.9722 (step 145), loss/total 0.4231, "
        "lr/group0 3.000e-04, loss/box nan"
    ]


def test_epoch_counts_from_one() -> None:
    """At the end of an epoch the line has the completed epoch."""
    sink = LogSink()
    assert line(sink, MetricsRecord(1, 12, 12, VALUES), step_in_epoch=5).startswith("epoch 2,")
    assert line(sink, MetricsRecord(1, 7, 7, VALUES), step_in_epoch=0).startswith("epoch 1,")
    assert line(sink, MetricsRecord(0, 0, 0, VALUES), step_in_epoch=0).startswith("epoch 1,")


def test_names_select_metrics(caplog: pytest.LogCaptureFixture) -> None:
    """Names and patterns select metrics; a record without any gets no line."""
    caplog.set_level(logging.INFO)
    sink = LogSinkConfig(names=["loss/*", "eval/val/accuracy"])()
    sink.open(PipelineHookArgs())
    sink.write(MetricsRecord(0, 150, 75, VALUES[1:3]))
    sink.write(MetricsRecord(0, 150, 75, VALUES[2:3]))
    assert caplog.messages == ["epoch 1, step 150: loss/total 0.4231"]


def test_empty_list_of_names_is_refused() -> None:
    """An empty list would log nothing."""
    with pytest.raises(pydantic.ValidationError, match="names"):
        LogSinkConfig(names=[])
