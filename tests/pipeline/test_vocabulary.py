"""Channels, counters, limits, requests, the metrics board and hook arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import (
    CHANNEL_NAMES,
    PIPELINE_CHANNELS,
    PipelineHookArgs,
    TrainerLimits,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.metrics import MetricsBoard, UnknownMetricError
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.requests import Requests


def test_channels_nest_in_earlier_channels() -> None:
    """Every channel except the outermost has an earlier channel as parent."""
    assert PIPELINE_CHANNELS[0].parent is None
    for index, channel in enumerate(PIPELINE_CHANNELS[1:], start=1):
        assert channel.parent in CHANNEL_NAMES[:index]


@given(st.lists(st.sampled_from(["step", "epoch", "committed", "skipped"])))
def test_counters_count_their_events(events: list[str]) -> None:
    """Each counter is the number of its events; step_id restarts with each epoch."""
    progress = TrainerProgress()
    for event in events:
        if event == "step":
            progress.finish_step()
        elif event == "epoch":
            progress.finish_epoch()
        else:
            progress.finish_optimizer_step(event == "committed")
    last_epoch = max((i + 1 for i, event in enumerate(events) if event == "epoch"), default=0)
    assert progress == TrainerProgress(
        epoch_id=events.count("epoch"),
        step_id=events[last_epoch:].count("step"),
        global_step_id=events.count("step"),
        optimizer_step_id=events.count("committed"),
        skipped_optimizer_steps=events.count("skipped"),
    )
    copy = TrainerProgress()
    copy.load_state_dict(progress.state_dict())
    assert copy == progress


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected a state of the progress of version 1, found version 2"),
        ({"version": None}, "found version None"),
        ({"epochs": 1}, "expected the counters epoch_id, .* found .*epochs"),
        ({"epoch_id": -1}, "progress.epoch_id must be an int >= 0, found -1"),
        ({"step_id": 1.0}, "progress.step_id must be an int >= 0, found 1.0"),
        ({"step_id": True}, "progress.step_id must be an int >= 0, found True"),
    ],
)
def test_invalid_progress_state_is_refused(change: dict[str, Any], message: str) -> None:
    """Other versions, counters and values are named, and nothing is loaded."""
    progress = TrainerProgress(1, 2, 3, 4, 5)
    with pytest.raises(StateError, match=message):
        progress.load_state_dict({**TrainerProgress().state_dict(), **change})
    assert progress == TrainerProgress(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("given_limits", "message"),
    [
        ({}, "needs a limit: give max_step, max_optimizer_step or max_epoch"),
        ({"max_step": 0}, "max_step must be an int >= 1, got 0"),
        ({"max_epoch": -3}, "max_epoch must be an int >= 1, got -3"),
        ({"max_optimizer_step": 1.5}, "max_optimizer_step must be an int >= 1, got 1.5"),
        ({"max_step": True}, "max_step must be an int >= 1, got True"),
    ],
)
def test_invalid_limits_are_refused(given_limits: dict[str, Any], message: str) -> None:
    """A missing limit, or one that is not an int >= 1, is named."""
    with pytest.raises(PipelineConfigError, match=message):
        TrainerLimits(**given_limits)


@pytest.mark.parametrize(
    ("limits", "ends"),
    [
        (TrainerLimits(max_step=10), {"global_step_id": 10}),
        (TrainerLimits(max_optimizer_step=10), {"optimizer_step_id": 10}),
        (TrainerLimits(max_epoch=10), {"epoch_id": 10}),
        (TrainerLimits(max_step=10, max_epoch=99), {"global_step_id": 11}),
    ],
)
def test_first_limit_ends_the_run(limits: TrainerLimits, ends: dict[str, int]) -> None:
    """A run ends when any of its limits is reached, and not before."""
    assert limits.reached(TrainerProgress(**ends))
    assert not limits.reached(TrainerProgress(**dict.fromkeys(ends, 9)))


def test_first_stop_request_is_kept() -> None:
    """The request has the reason and, by default, the calling function and line."""
    requests = Requests()
    requests.stop("enough")
    requests.stop("later", by="someone else")
    request = requests.stop_request
    assert request is not None
    assert request.reason == "enough"
    assert request.by.startswith("test_first_stop_request_is_kept (test_vocabulary.py:")
    named = Requests()
    named.stop("enough", by="me")
    assert named.stop_request is not None
    assert named.stop_request.by == "me"


def test_board_keeps_latest_value() -> None:
    """Numbers and tensors are read back as numbers; a tensor keeps no graph."""
    board = MetricsBoard()
    board.publish("loss", 2)
    board.publish("norm", torch.tensor([1.5], requires_grad=True))
    board.publish("loss", 0.5)
    assert board.latest("loss") == 0.5
    assert board.latest("norm") == 1.5
    assert board.names() == ["loss", "norm"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"metric 'loss' must be a single number, got a tensor of shape \(3,\)"),
        ("high", "metric 'loss' must be a number, got str"),
        (None, "metric 'loss' must be a number, got NoneType"),
    ],
)
def test_non_scalars_are_refused(value: Any, message: str) -> None:
    """The error names the metric and the type that was found."""
    with pytest.raises(TypeError, match=message):
        MetricsBoard().publish("loss", value)


def test_unknown_metric_error_lists_published_names() -> None:
    """The error has the nearest name and all names, or says that there are none."""
    board = MetricsBoard()
    with pytest.raises(UnknownMetricError, match=r"no metric 'loss' .*Published: none"):
        board.latest("loss")
    board.publish("train/loss", 1.0)
    board.publish("accuracy", 1.0)
    with pytest.raises(UnknownMetricError, match=r"mean 'train/loss'.*accuracy, train/loss"):
        board.latest("train/los")


def test_arguments_read_fields_of_the_run() -> None:
    """Shared fields are the fields of the run, and the counters are live."""
    run = PipelineRun.standalone(limits=TrainerLimits(max_step=3, max_epoch=4), dataloader=[1])
    args = PipelineHookArgs(run)
    run.progress.finish_step()
    run.progress.finish_optimizer_step(committed=True)
    assert (args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id) == (
        0,
        1,
        1,
        1,
    )
    assert (args.max_step, args.max_optimizer_step, args.max_epoch) == (3, None, 4)
    assert args.progress is run.progress
    assert args.limits is run.limits
    assert args.metrics is run.metrics
    assert args.requests is run.requests
    assert args.dataloader == [1]
    assert [args.optimizer, args.lr_scheduler] == [None] * 2
    assert repr(args).startswith("<PipelineHookArgs at step 1 (epoch 1, 1 updates")


def test_loss_of_arguments_is_detached() -> None:
    """Hooks see the loss without its graph, or None before the forward."""
    args = PipelineHookArgs()
    assert args.loss is None
    loss = PipelineHookArgs(attached_loss=torch.ones((), requires_grad=True) * 2).loss
    assert loss is not None
    assert not loss.requires_grad
    assert loss.item() == 2


def test_misspelled_field_is_refused() -> None:
    """A misspelled field is an error, not a new attribute."""
    with pytest.raises(AttributeError):
        PipelineHookArgs().batches = 3  # type: ignore[attr-defined]  # what the test is about


def test_fields_have_channels() -> None:
    """Each field lists the channels where it has a meaning; an unknown field is an error."""
    assert PipelineHookArgs.channels_of("batch") == (
        "on_step",
        "on_batch",
        "on_model_forward",
        "on_model_backward",
        "on_optimizer_step",
    )
    assert PipelineHookArgs.channels_of("loss") == PipelineHookArgs.channels_of("batch")
    assert PipelineHookArgs.channels_of("exception") == CHANNEL_NAMES
    assert PipelineHookArgs.channels_of("model") == CHANNEL_NAMES
    with pytest.raises(AttributeError, match="no field 'bach'"):
        PipelineHookArgs.channels_of("bach")
