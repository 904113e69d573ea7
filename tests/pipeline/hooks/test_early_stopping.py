"""Early stopping, also across a resume."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from published import NAME, Evaluated, Logged
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.early_stopping import EarlyStopping, EarlyStoppingConfig
from robo_orchard_lab.pipeline.metrics import UnknownMetricError
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import make_trainer

NAN, INF = math.nan, math.inf

# mode, options, a value for each step, the step after which it stops, the best value, its step
TABLE: dict[str, tuple[str, dict[str, Any], list[float | None], int | None, Any, Any]] = {
    "falling": ("min", {"patience": 1}, [3, 2, 1, 0], None, 0, 4),
    "rising": ("max", {"patience": 1}, [0, 1, 2, 3], None, 3, 4),
    "worse": ("min", {"patience": 1}, [3, 2, 5, 1], 3, 2, 2),
    "worse for a while": ("min", {"patience": 2}, [3, 4, 2, 3, 3, 1], 5, 2, 3),
    "just in time": ("min", {"patience": 3}, [3, 4, 4, 2, 4, 4, 1], None, 1, 7),
    "max": ("max", {"patience": 2}, [0.1, 0.3, 0.2, 0.3, 0.9], 4, 0.3, 2),
    "a tie is no better": ("min", {"patience": 2}, [1, 1, 1, 0], 3, 1, 1),
    "delta": ("min", {"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.5, 0], 3, 3, 1),
    "more than delta": ("max", {"patience": 2, "min_delta": 0.5}, [0, 0.4, 0.6, 0, 2], None, 2, 5),
    "small gains don't add up": ("max", {"patience": 3, "min_delta": 1}, [0, 1, 1, 1, 9], 4, 0, 1),
    "NaN is no better": ("min", {"patience": 2}, [3, NAN, 2, NAN, NAN, 0], 5, 2, 3),
    "NaN at first": ("min", {"patience": 2}, [NAN, 3, 4, 2], None, 2, 4),
    "nothing but NaN": ("max", {"patience": 3}, [NAN, NAN, NAN, 1], 3, None, None),
    "inf is the worst": ("min", {"patience": 2}, [INF, INF, 1], 2, None, None),
    "after inf": ("min", {"patience": 2}, [INF, 5, INF, 4], None, 4, 4),
    "-inf is never the best": ("min", {"patience": 2}, [1, -INF, 0, -INF], None, 0, 3),
    "inf is never the best": ("max", {"patience": 1, "min_delta": 1}, [INF, INF], 1, None, None),
    "inf reaches nothing": ("max", {"stop_on": 5}, [INF, 1, 6], 3, 6, 3),
    "-inf is the worst": ("max", {"patience": 1}, [-INF, 1], 1, None, None),
    "now and then": ("min", {"patience": 2}, [None, 3, None, 4, None, 4, 0], 6, 3, 2),
    "reached": ("max", {"stop_on": 0.9}, [0.5, 0.9, 1.0], 2, 0.9, 2),
    "passed": ("min", {"stop_on": 0.9}, [5, NAN, 1, 0.5, 0], 4, 0.5, 4),
    "not reached": ("min", {"stop_on": 0.9, "patience": 9}, [5, 1, NAN], None, 1, 2),
    "out of patience": ("max", {"stop_on": 9, "patience": 1}, [5, 1, 10], 2, 5, 1),
    "reached within delta": ("max", {"stop_on": 2, "min_delta": 5, "patience": 9}, [0, 2], 2, 0, 1),
}
SOURCES = {"logged": Logged, "evaluated": Evaluated}


def build(
    case: str, source: str = "logged", **options: Any
) -> tuple[HookBasedTrainer, EarlyStopping]:
    mode, fields, values, *_ = TABLE[case]
    values = [*values, None]  # the run could continue
    stopping = EarlyStoppingConfig(monitor=NAME, mode=mode, **fields)()  # type: ignore[arg-type]  # from a table
    options = {"max_step": len(values), **options}
    return make_trainer([stopping, SOURCES[source](values)], **options), stopping


def outcome(trainer: HookBasedTrainer, stopping: EarlyStopping) -> tuple[Any, ...]:
    """Return the end of the run, its reason and the best value."""
    request = trainer.requests.stop_request
    return (
        trainer.progress.global_step_id,
        request and (request.by, request.reason),
        stopping.best_value,
        stopping.best_step,
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", TABLE)
def test_run_stops_at_the_expected_step(case: str, source: str) -> None:
    """The run stops at the commit point of the deciding value."""
    *_, values, stops_after, best, best_step = TABLE[case]
    trainer, stopping = build(case, source)
    trainer()
    steps, request, *found = outcome(trainer, stopping)
    assert steps == (stops_after or len(values) + 1)
    assert (request is not None) == (stops_after is not None)
    assert found == [best, best_step]


@pytest.mark.parametrize("case", TABLE)
def test_resumed_run_stops_at_the_same_step(case: str, tmp_path: Path) -> None:
    """A run saved after any step and resumed ends like an uninterrupted run."""
    uninterrupted = build(case)
    uninterrupted[0]()
    for step in range(1, uninterrupted[0].progress.global_step_id + 1):
        first, _ = build(case, max_step=step)
        with suppress(UnknownMetricError):  # no value yet
            first()
        first.save_checkpoint(tmp_path / str(step))
        resumed = build(case, resume_from=tmp_path / str(step))
        resumed[0]()
        assert outcome(*resumed) == outcome(*uninterrupted)


def test_stop_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of stop has its own reason."""
    caplog.set_level(logging.INFO)
    for case in ("worse for a while", "nothing but NaN", "passed"):
        build(case)[0]()
    reasons = [r.getMessage().partition("skipped): ")[2] for r in caplog.records]
    assert [text for text in reasons if text] == [
        f"{NAME} did not improve on 2.0000 (step 3) in 2 evaluations, requested by EarlyStopping",
        f"{NAME} had no finite value in 3 evaluations, requested by EarlyStopping",
        f"{NAME} is 0.5000, which reaches stop_on=0.9, requested by EarlyStopping",
    ]


def test_stopped_run_continues_with_more_patience(tmp_path: Path) -> None:
    """A stopped run resumes when patience is raised."""
    stopped, _ = build("worse")
    stopped()
    stopped.save_checkpoint(tmp_path / "saved")
    stopping = EarlyStoppingConfig(monitor=NAME, mode="min", patience=2)()
    source = Logged([3, 2, 5, 1])
    resumed = make_trainer([stopping, source], max_step=4, resume_from=tmp_path / "saved")
    resumed()
    assert (resumed.progress.global_step_id, stopping.best_value) == (4, 1)


def test_two_hooks_monitor_different_metrics() -> None:
    """Each named hook monitors its metric; the first one due stops the run."""
    hooks = {
        "first": EarlyStoppingConfig(monitor=NAME, mode="min", patience=9),
        "second": EarlyStoppingConfig(monitor="eval/test/accuracy", mode="max", patience=2),
    }
    both = PipelineHooks.from_hooks(hooks)
    sources = [Evaluated([3, 2, 1, 0, 0]), Evaluated([1, 3, 2, 1, 5], "eval/test/accuracy")]
    trainer = make_trainer([both, *sources], max_step=5)
    trainer()
    request = trainer.requests.stop_request
    assert request is not None
    assert (trainer.progress.global_step_id, request.by) == (4, "second")
    first, second = both.all_hooks()
    assert isinstance(first, EarlyStopping)
    assert isinstance(second, EarlyStopping)
    assert (first.best_value, first.best_step) == (0, 4)
    assert (second.best_value, second.best_step) == (3, 2)


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_metric_is_refused(source: str) -> None:
    """The error names the hook and suggests a published name."""
    stopping = EarlyStoppingConfig(monitor="eval/val/los", mode="min", patience=1)
    trainer = make_trainer([stopping, SOURCES[source]([1, 2])], max_step=2)
    with pytest.raises(
        UnknownMetricError,
        match=r"no metric 'eval/val/los' .*which EarlyStopping waits for; "
        r"did you mean 'eval/val/loss'\?",
    ):
        trainer()
    # A validation's names are known with its first evaluation, others at the run's end.
    assert trainer.progress.global_step_id == (1 if source == "evaluated" else 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "set patience"),
        ({"patience": 0}, "patience"),
        ({"patience": 2.5}, "patience"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta"),
        ({"patience": 1, "min_delta": INF}, "min_delta"),
        ({"stop_on": NAN}, "stop_on"),
        ({"patience": 1, "mode": "best"}, "mode"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """Fields out of range, and configs that never stop, are refused."""
    with pytest.raises(ValidationError, match=message):
        EarlyStoppingConfig(**{"monitor": NAME, "mode": "min", **fields})


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    stopping = EarlyStoppingConfig(monitor=NAME, mode="min", patience=1)()
    with pytest.raises(StateError, match="EarlyStopping of version 1, found version 2"):
        stopping.load_state_dict({"version": 2})


def test_hook_does_not_affect_training() -> None:
    """The hook reads no tensors, changes no weights and restores its state."""
    values = [3.0, NAN, 3.0, 2.0, 2.0, 1.0]
    cfg = EarlyStoppingConfig(monitor=NAME, mode="min", patience=4)
    for source in SOURCES.values():
        extra_hooks = [partial(source, values)]
        assert_no_device_sync(cfg, extra_hooks=extra_hooks)
        assert_weights_unchanged(cfg, extra_hooks=extra_hooks)
        assert_state_round_trip(cfg, extra_hooks=extra_hooks)


def test_hook_unsubscribes_after_the_run() -> None:
    """After the run, the hook receives no values."""
    trainer, stopping = build("falling")
    trainer()
    trainer.metrics.publish(NAME, -1, reduce="last")
    trainer.metrics.flush(log=True)
    assert stopping.best_value == 0
