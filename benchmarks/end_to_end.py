"""Complete trainings, compared with a plain loop that does the same work and with peers.

Each training has a progress bar, a log of the loss, an evaluation and a checkpoint at the end of
each epoch, and runs in its own process, on one thread. Contenders take turns.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.pythons import HERE, Where, python_of, variables
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, interleave
from benchmarks.trainings.sample import Sample
from benchmarks.trainings.workloads import WORKLOADS, has_bf16

BAR = 1.01
LONGEST_S = 300
OUTPUT = "output.txt"  # of a training: its progress bar and its log
PLAIN, FLUSHED = "plain loop", "plain loop, checkpoints flushed to the disk"
OURS = "this trainer"
IN_BACKGROUND = f"{OURS}, saving in the background"

OWN = {
    PLAIN: "plain:train",
    FLUSHED: "plain:train_flushed",
    OURS: "ours:train",
    IN_BACKGROUND: "ours:train_in_background",
}
PEERS = {
    "Accelerate, plain loop": "accelerate_loop:train",
    "Fabric": "fabric_loop:train",
    "Lightning": "lightning_trainer:train",
    "Transformers' Trainer": "transformers_trainer:train",
    "Ignite": "ignite_engine:train",
    "Composer": "composer_trainer:train",
    "MMEngine": "mmengine_runner:train",
}


@dataclass(frozen=True, slots=True)
class Trainings:
    """Results of one workload's contenders."""

    workload: str
    quick: bool
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Of each contender, in the order of its trainings."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contenders that don't run here, with the reason."""

    def train(self, name: str) -> float:
        """Train in a new process; return the seconds, or NaN if a peer does not run here."""
        if name in self.absent:
            return nan
        contender = (OWN | PEERS)[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                sample = _train(self.workload, contender, Path(folder), quick=self.quick)
            except (subprocess.SubprocessError, OSError) as error:
                lines = (Path(folder) / OUTPUT).read_text("utf-8").strip().splitlines()
                reason = lines[-1] if lines else str(error)
                if name in OWN:
                    raise RuntimeError(f"{self.workload} by {name}: {reason}") from None
                self.absent[name] = reason
                return nan
        if sample.faults and name in OWN:
            raise RuntimeError(f"{self.workload} by {name}: {'; '.join(sample.faults)}")
        if sample.faults:
            self.absent[name] = "; ".join(sample.faults)
            return nan
        self.samples.setdefault(name, []).append(sample)
        return sample.seconds

    def rows(self, timed: Sequence[Samples]) -> list[Row]:
        """Return a row for each contender."""
        rows = []
        for samples in timed:
            for name, seconds in samples.values.items():
                if name in self.absent:
                    rows.append(Row(name, note=f"not measured: {self.absent[name]}"))
                elif name != PLAIN or not rows:
                    reference = samples.references.get(name)
                    bar = BAR if name == OURS else None
                    note = self._note(name)
                    rows.append(
                        Row.of(name, seconds, reference=reference, bar=bar, note=note, scale=1e3)
                    )
        return rows

    def faults(self) -> list[str]:
        """Return our trainings that end with other weights than the plain loop's."""
        return [
            f"{self.workload} by {name}: its weights differ from the plain loop's"
            for name in OWN
            if any(each.weights != self.reference.weights for each in self.samples.get(name, []))
        ]

    @property
    def reference(self) -> Sample:
        return self.samples[PLAIN][0]

    def _note(self, name: str) -> str:
        samples = self.samples[name]

        def middle(value: Callable[[Sample], float]) -> float:
            return median(map(value, samples))

        cpu_seconds = middle(lambda sample: sample.cpu_seconds)
        peak_mb = middle(lambda sample: sample.peak_mb)
        start = middle(lambda sample: sample.start_seconds)
        figures = f"CPU {cpu_seconds:.2f} s, peak {peak_mb:.0f} MB, start {start:.1f} s"
        if name == PLAIN:
            return figures
        if all(sample.weights == self.reference.weights for sample in samples):
            return f"{figures}; equal weights"
        losses = self.reference.evaluation_loss, samples[0].evaluation_loss
        return (
            f"{figures}; OTHER weights: evaluation loss {losses[1]:.6g} instead of {losses[0]:.6g}"
        )


def run(*, quick: bool) -> Report:
    tables, faults = [], []
    for workload in WORKLOADS:
        trainings = Trainings(workload, quick)
        if quick:
            timed = [_timed(trainings, [PLAIN, OURS], rounds=1)]
        else:
            timed = [
                _timed(trainings, OWN, rounds=5, at_most_s=75),
                _timed(trainings, [PLAIN, *PEERS], rounds=3, shared_by=2),
            ]
        tables.append(
            Table(_title(workload), "ms", trainings.rows(timed), [_size(workload, quick)])
        )
        faults += trainings.faults()
    return Report("end_to_end", tables, faults, describe([*DISTRIBUTIONS, "mosaicml"]))


def _timed(trainings: Trainings, names: Iterable[str], **options: Any) -> Samples:
    trains = {name: partial(trainings.train, name) for name in names}
    # Each process starts cold; the first ones only read files that are not in memory yet.
    return interleave(trains, reference=PLAIN, warm_up=False, **options)


def _train(workload: str, contender: str, folder: Path, *, quick: bool) -> Sample:
    where: Where = "own" if quick or python_of("peers") is None else "peers"
    python = python_of(where)
    assert python is not None  # as above
    os.sync()  # the disk is idle
    result_file = folder / "result.json"
    command = [python, "-m", "benchmarks.trainings.sample", workload, contender, str(result_file)]
    command += [str(perf_counter_ns()), *(["--quick"] if quick else [])]
    with open(folder / OUTPUT, "wb") as output:
        subprocess.run(
            command,
            cwd=HERE.parent,
            env=variables(where),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
            timeout=LONGEST_S,
        )
    return Sample(**json.loads(result_file.read_text(encoding="utf-8")))


def _title(workload: str) -> str:
    if not WORKLOADS[workload].bf16:
        return WORKLOADS[workload].title
    precision = "bf16 autocast" if has_bf16() else "float32, since the CPU has no bf16"
    return f"{WORKLOADS[workload].title}, {precision}"


def _size(workload: str, quick: bool) -> str:
    kind = WORKLOADS[workload]
    size = kind.quick if quick else kind.full
    window = f", accumulation over {kind.accumulate}" if kind.accumulate > 1 else ""
    return (
        f"{size.epochs} epochs of {size.training} batches of {kind.batch_size}{window}, each with "
        f"an evaluation of {size.evaluation} batches; a logging point every {size.log_every} "
        "batches. Start: from the start of the process to the first forward pass."
    )
