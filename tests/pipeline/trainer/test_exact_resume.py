"""Stopped anywhere and gone on with by another process, a run is the run that never stopped."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest

from full_training import STEPS, STEPS_OF_TWO, build
from robo_orchard_lab.testing import ResumeProof, prove_resume

EVERYWHERE = range(1, STEPS + 2)
"""In and between windows and epochs, in the last step of an epoch, at the end and after it."""
ON_TWO_RANKS = range(1, STEPS_OF_TWO + 2)
"""The same, where each step has a batch for each of two ranks."""
VARIANTS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "2 workers": {"workers": 2},
    "2 persistent workers": {"workers": 2, "persistent": True},
    "another number of workers": {"workers": 2, "resumed_workers": 0},
}
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "keyed by sample": {"keyed_by": "sample"},
    "plateau": {"plateau": True},
    "own generator": {"data": "own generator"},
    "weighted": {"data": "weighted"},
    "weighted, with workers": {"data": "weighted", "workers": 2, "persistent": True},
    "batch sampler": {"data": "batch sampler", "workers": 2},
    "full batches": {"data": "full batches", "accumulate": 1},
    "a list": {"data": "a list"},
    "keyed by sample, with workers": {"keyed_by": "sample", "workers": 2, "resumed_workers": 1},
    "stream": {"data": "stream"},
    "more hooks": {"more_hooks": True, "saves": "every step"},
}


def prove(stops: Iterable[int], processes: int = 1, **options: Any) -> ResumeProof:
    # What StatsMonitor measures in seconds is in the log, too.
    files = [] if options.get("more_hooks") else ["metrics.jsonl"]
    trainer = partial(build, **options)
    proof = prove_resume(trainer, None, stops, files=files, processes=processes)
    proof.check()
    return proof


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_at_every_commit_point(variant: str) -> None:
    """Fifteen processes, each of which does one step, do what one process does."""
    assert prove(EVERYWHERE, **VARIANTS[variant]).steps == STEPS


def test_two_ranks_are_stopped_at_every_commit_point() -> None:
    """So it is on two ranks, each of which has gradients, buffers and random states of its own."""
    assert prove(ON_TWO_RANKS, processes=2).steps == STEPS_OF_TWO


def test_two_ranks_with_workers_are_stopped() -> None:
    """Within and between windows, and between epochs, also where workers load ahead."""
    half = STEPS_OF_TWO // 2
    prove([1, 3, half, STEPS_OF_TWO - 1], processes=2, workers=2, persistent=True)


@pytest.mark.parametrize("stop", [2, 3, 4, 7, 12, 14])
def test_stopped_once_at_any_commit_point(stop: int) -> None:
    """A process that goes on to the end does what it would have done without the stop."""
    prove([stop])


def test_a_run_that_stops_early_is_over_for_good() -> None:
    """Stopped by a metric in the middle of an epoch, it does nothing when it is gone on with."""
    assert prove([2, 5, 8, 14], patience=3, min_delta=1e6).steps == 9


def test_stopped_between_two_epochs() -> None:
    """Asked for when the epoch is left, a stop is as exact as in its last step."""
    assert prove([10], stop_between=True).steps == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_stopped_at_every_commit_point_in_more_ways(variant: str) -> None:
    """So it is with every kind of data and of schedule."""
    assert prove(EVERYWHERE, **MORE_VARIANTS[variant]).steps >= STEPS


@pytest.mark.slow
@pytest.mark.parametrize("stop", EVERYWHERE)
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE_VARIANTS])
def test_stopped_once_at_any_commit_point_in_every_way(stop: int, variant: str) -> None:
    """And so it is when the run goes on to its end."""
    prove([stop], **{**VARIANTS, **MORE_VARIANTS}[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE_VARIANTS])
def test_two_ranks_are_stopped_at_every_commit_point_in_every_way(variant: str) -> None:
    """And so it is on two ranks."""
    options = {**VARIANTS, **MORE_VARIANTS}[variant]
    assert prove(ON_TWO_RANKS, processes=2, **options).steps >= STEPS_OF_TWO


@pytest.mark.slow
@pytest.mark.parametrize("stop", ON_TWO_RANKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_stopped_once(stop: int, variant: str) -> None:
    """Also where they go on to their end."""
    prove([stop], processes=2, **VARIANTS[variant])
