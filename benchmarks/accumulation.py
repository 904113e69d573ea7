"""Overhead of one micro-step with gradient accumulation over 4 batches."""

from benchmarks.overhead import HOOKS, OWN, measure
from benchmarks.report import Report
from benchmarks.workload import Settings

BARS = {0: 1.10, HOOKS: 1.10}


def run(*, quick: bool) -> Report:
    return measure(
        "accumulation",
        Settings(steps=300 if quick else 2000, accumulate=4),
        OWN,
        bars=BARS,
        rounds=2 if quick else 15,
    )
