"""Overhead of one step under bf16 autocast, with the loss in float32."""

from benchmarks.overhead import HOOKS, OWN, measure
from benchmarks.report import Report
from benchmarks.workload import Settings

BARS = {0: 1.10, HOOKS: 1.10}


def run(*, quick: bool) -> Report:
    return measure(
        "bf16",
        Settings(steps=300 if quick else 2000, bf16=True),
        OWN,
        bars=BARS,
        rounds=2 if quick else 11,
    )
