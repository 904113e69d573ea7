"""Memory and step time of a long run with every hook on.

Memory is the process's resident memory after 1,000 steps and at the end. A step's time is the CPU
time of the training thread, which other processes hardly change: the lower quartile of blocks of 50
steps, over 500 steps, which excludes saves, evaluations and ends of epochs.
"""

import gc
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import thread_time

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch

from benchmarks.environment import describe
from benchmarks.every_hook import EPOCH_STEPS, trainer_with_every_hook
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread

BAR = 1.01
FROM_STEP = 1_000
BLOCK_STEPS = 50


@dataclass(frozen=True, slots=True)
class Endured:
    """Memory and step time of a run, early and at its end."""

    early_mib: float
    late_mib: float
    early_us: float
    """CPU time of one step."""
    late_us: float

    @property
    def growth(self) -> float:
        """Growth of the memory, as a ratio."""
        return self.late_mib / self.early_mib

    @property
    def slowdown(self) -> float:
        """Slowdown of a step, as a ratio."""
        return self.late_us / self.early_us


def endure(steps: int) -> Endured:
    """Train with every hook on for at least 2,000 steps, in complete epochs of 500."""
    torch.set_num_threads(1)
    process = psutil.Process()
    memory: dict[int, float] = {}
    marks: dict[int, float] = {}
    looked_at = {FROM_STEP, steps - 1}

    def look(step: int) -> None:
        if step in looked_at:
            gc.collect()
            memory[step] = process.memory_info().rss / 2**20
        if step % BLOCK_STEPS == 1:  # the logging point of a block lies in its middle or end
            marks[step] = thread_time()

    log = logging.getLogger("robo_orchard_lab")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer_with_every_hook(Path(folder), steps, look)()
    finally:
        log.setLevel(before)
    return Endured(
        memory[FROM_STEP],
        memory[steps - 1],
        _us_per_step(marks, FROM_STEP),
        _us_per_step(marks, steps - EPOCH_STEPS),
    )


def _us_per_step(marks: dict[int, float], first: int) -> float:
    """Return the CPU time in microseconds per step of the epoch that begins at a step."""
    begins = range(first + 1, first + EPOCH_STEPS - BLOCK_STEPS, BLOCK_STEPS)
    blocks = [(marks[begin + BLOCK_STEPS] - marks[begin]) / BLOCK_STEPS for begin in begins]
    return quantiles(blocks, n=4, method="inclusive")[0] * 1e6


def run(*, quick: bool) -> Report:
    steps = 2_000 if quick else 10_000
    endured = endure(steps)
    tables = [
        _table("Memory of the process", "MiB", steps, endured.early_mib, endured.late_mib, BAR),
        _table("CPU time of a step", "us per step", steps, endured.early_us, endured.late_us),
    ]
    return Report("endurance", tables, environment=describe(["torch", "accelerate"]))


def _table(
    title: str, unit: str, steps: int, early: float, late: float, bar: float | None = None
) -> Table:
    rows = [
        Row(f"after {FROM_STEP:,} steps", _exactly(early)),
        Row(f"after {steps:,} steps", _exactly(late), _exactly(late / early), bar),
    ]
    return Table(title, unit, rows)


def _exactly(number: float) -> Spread:
    return Spread(number, number, number)
