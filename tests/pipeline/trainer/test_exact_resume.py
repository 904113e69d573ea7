"""Exact resume from every commit point in another process."""

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
    # The log also holds StatsMonitor's times in seconds.
    files = [] if options.get("more_hooks") else ["metrics.jsonl"]
    trainer = partial(build, **options)
    proof = prove_resume(trainer, None, stops, files=files, processes=processes)
    proof.check()
    return proof


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_every_commit_point_resumes_exactly(variant: str) -> None:
    """Fifteen processes of one step each equal one uninterrupted process."""
    assert prove(EVERYWHERE, **VARIANTS[variant]).steps == STEPS


def test_two_ranks_stopped_at_every_commit_point_resume_exactly() -> None:
    """Gradients, buffers and RNG states of two ranks resume exactly."""
    assert prove(ON_TWO_RANKS, processes=2).steps == STEPS_OF_TWO


def test_two_ranks_with_workers_resume_exactly() -> None:
    """Two ranks with prefetching workers resume exactly within and between windows and epochs."""
    half = STEPS_OF_TWO // 2
    prove([1, 3, half, STEPS_OF_TWO - 1], processes=2, workers=2, persistent=True)


@pytest.mark.parametrize("stop", [2, 3, 4, 7, 12, 14])
def test_a_run_stopped_once_resumes_exactly(stop: int) -> None:
    """A process resumed after one stop and run to its end equals the uninterrupted run."""
    prove([stop])


def test_a_run_that_stops_early_stays_completed() -> None:
    """A run stopped by early stopping in the middle of an epoch does nothing when resumed."""
    assert prove([2, 5, 8, 14], patience=3, min_delta=1e6).steps == 9


def test_a_stop_between_two_epochs_resumes_exactly() -> None:
    """A stop requested at the end of an epoch resumes as exactly as a stop in its last step."""
    assert prove([10], stop_between=True).steps == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_more_variants_stopped_at_every_commit_point_resume_exactly(variant: str) -> None:
    """Runs with each kind of data and LR scheduler resume exactly from every commit point."""
    assert prove(EVERYWHERE, **MORE_VARIANTS[variant]).steps >= STEPS


@pytest.mark.slow
@pytest.mark.parametrize("stop", EVERYWHERE)
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE_VARIANTS])
def test_every_variant_stopped_once_resumes_exactly(stop: int, variant: str) -> None:
    """Every variant stopped once and run to its end equals the uninterrupted run."""
    prove([stop], **{**VARIANTS, **MORE_VARIANTS}[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE_VARIANTS])
def test_every_variant_on_two_ranks_resumes_exactly(variant: str) -> None:
    """Every variant resumes exactly from every commit point on two ranks."""
    options = {**VARIANTS, **MORE_VARIANTS}[variant]
    assert prove(ON_TWO_RANKS, processes=2, **options).steps >= STEPS_OF_TWO


@pytest.mark.slow
@pytest.mark.parametrize("stop", ON_TWO_RANKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_stopped_once_resume_exactly(stop: int, variant: str) -> None:
    """Two ranks stopped once and run to their end equal the uninterrupted run."""
    prove([stop], processes=2, **VARIANTS[variant])
