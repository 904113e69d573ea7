"""Stopped anywhere and gone on with by another process, a run is the run that never stopped."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest

from full_training import STEPS, build
from robo_orchard_lab.testing import ResumeProof, prove_resume

EVERYWHERE = range(1, STEPS + 2)
"""In and between windows and epochs, in the last step of an epoch, at the end and after it."""
VARIANTS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "2 workers": {"workers": 2},
    "plateau": {"plateau": True},
}


def prove(stops: Iterable[int], **options: Any) -> ResumeProof:
    proof = prove_resume(partial(build, **options), None, stops, files=["metrics.jsonl"])
    proof.check()
    return proof


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_at_every_commit_point(variant: str) -> None:
    """Fifteen processes, each of which does one step, do what one process does."""
    assert prove(EVERYWHERE, **VARIANTS[variant]).steps == STEPS


@pytest.mark.parametrize("stop", EVERYWHERE)
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
@pytest.mark.parametrize("stop", EVERYWHERE)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "no workers"])
def test_stopped_once_at_any_commit_point_in_every_way(stop: int, variant: str) -> None:
    """So it is with workers and with every schedule."""
    prove([stop], **VARIANTS[variant])
