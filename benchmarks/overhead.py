"""Overhead of a trainer on the step of a tiny model, with and without hooks, compared with peers.

All contenders train the same job in the same process, in turns, and must end with the weights of
the bare loop. The step time comes from marks of the model (workload.py).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, differences, interleave
from benchmarks.workload import Job, Settings

HOOKS = 10
MANY_HOOKS = 1000  # for ours, whose ten hooks cost less than the noise between two runs
BARS = {0: 1.08, HOOKS: 1.12}  # of the bare loop's step, by the number of hooks
BAR_PER_HOOK_NS = 250.0

BARE = "bare torch loop"
OURS = "this trainer"


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    module: str
    """Module of benchmarks.contenders; its imports decide whether the contender is measured."""
    hook_counts: Sequence[int] = (0, HOOKS)
    peer: bool = False
    """Another framework, which may not run here."""

    def label(self, hook_count: int) -> str:
        """Return the name of a contender's row."""
        return self.name if len(self.hook_counts) == 1 else f"{self.name}, {hook_count} hooks"


OWN = (
    Contender(BARE, "bare", (0,)),
    Contender("Accelerate, plain loop", "accelerate_loop", (0,)),
    Contender(OURS, "ours", (0, HOOKS, MANY_HOOKS)),
    Contender(f"{OURS}, seeding for each batch", "ours_keyed", (0,)),
)
PEERS = (
    Contender("Ignite", "ignite_peer", peer=True),
    Contender("Fabric", "fabric_peer", peer=True),
    Contender("MMEngine", "mmengine_peer", peer=True),
    Contender("Lightning", "lightning_peer", peer=True),
    Contender("Transformers' Trainer", "transformers_peer", peer=True),
)

DISTRIBUTIONS = (
    "robo-orchard-hooks",
    "torch",
    "accelerate",
    "pytorch-ignite",
    "mmengine",
    "lightning",
    "transformers",
)


def run(*, quick: bool) -> Report:
    return measure(
        "overhead",
        Settings(steps=300 if quick else 2000),
        OWN if quick else OWN + PEERS,
        bars=BARS,
        rounds=2 if quick else 13,
    )


def measure(
    benchmark: str,
    settings: Settings,
    contenders: Sequence[Contender],
    *,
    bars: Mapping[int, float],
    rounds: int,
) -> Report:
    """Time the step of each contender; the bars, by number of hooks, apply to ours."""
    timed = time_steps(settings, contenders, rounds=rounds)
    samples = timed.samples
    steps = step_rows(contenders, samples, bars)
    tables = [
        Table(
            f"One step{_kind(settings)}",
            "us per step",
            [*steps, *timed.absent],
            [timed.weights_note(), *_compared_with_peers(steps)],
        ),
        Table(
            "One hook's before and after, within a step",
            "ns per hook",
            _hook_rows(contenders, samples),
        ),
    ]
    return Report(benchmark, tables, timed.faults(), describe(DISTRIBUTIONS))


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """Results of contenders that took turns."""

    samples: Samples
    weights: Mapping[str, torch.Tensor]
    """Final weights of each contender."""
    absent: Sequence[Row]
    """Peers that don't run here, and why."""

    def faults(self) -> list[str]:
        """Return the contenders whose weights differ from the bare loop's beyond rounding."""
        return [
            f"{name} ends with other weights than the bare loop, by up to {distance:.3g}"
            for name, distance in self._distances().items()
            if distance > 1e-5
        ]

    def weights_note(self) -> str:
        """Describe which contenders have the bare loop's weights, bit for bit."""
        inexact = {name: distance for name, distance in self._distances().items() if distance > 0}
        if not inexact:
            return "All end with the weights of the bare loop, bit for bit."
        listed = ", ".join(f"{name} by up to {distance:.1e}" for name, distance in inexact.items())
        return f"All end with the weights of the bare loop, bit for bit, but for: {listed}."

    def _distances(self) -> dict[str, float]:
        reference = self.weights[BARE]
        return {
            name: float((trained - reference).abs().max()) for name, trained in self.weights.items()
        }


def time_steps(settings: Settings, contenders: Sequence[Contender], *, rounds: int) -> TimedSteps:
    """Run the contenders in turns; failing peers are reported, and ours must not fail."""
    torch.set_num_threads(1)
    weights: dict[str, torch.Tensor] = {}
    trains: dict[str, Callable[[], float]] = {}
    absent: list[Row] = []
    for contender in contenders:
        try:
            timed = _timed_runs(contender, settings, weights)
        except Exception as error:  # any error of a framework that does not fit this machine
            if not contender.peer:
                raise
            first_line = str(error).partition("\n")[0]
            absent.append(Row(contender.name, note=f"not measured: {first_line}"))
        else:
            trains.update(timed)
    return TimedSteps(interleave(trains, reference=BARE, rounds=rounds), weights, absent)


def _timed_runs(
    contender: Contender, settings: Settings, weights: dict[str, torch.Tensor]
) -> dict[str, Callable[[], float]]:
    """Return a timed run for each number of hooks, which stores its final weights in `weights`.

    Each contender runs a few steps first, so an unsupported contender raises here.
    """
    module = importlib.import_module(f"benchmarks.contenders.{contender.module}")
    train: Callable[[Job, int], None] = module.train

    def timed(label: str, hook_count: int) -> float:
        job = Job(settings)
        train(job, hook_count)
        weights[label] = job.weights()
        return job.ns_per_step()

    runs: dict[str, Callable[[], float]] = {}
    for hook_count in contender.hook_counts:
        train(Job(replace(settings, steps=4 * settings.accumulate)), hook_count)
        label = contender.label(hook_count)
        runs[label] = partial(timed, label, hook_count)
    return runs


def step_rows(
    contenders: Sequence[Contender],
    samples: Samples,
    bars: Mapping[int, float],
) -> list[Row]:
    """Return a row with each contender's step and its ratio to the bare loop's."""
    return [
        Row.of(
            label,
            samples.values[label],
            reference=samples.references.get(label),
            bar=bars.get(hook_count) if contender.name == OURS else None,
            scale=1e-3,
        )
        for contender in contenders
        for hook_count in contender.hook_counts
        if (label := contender.label(hook_count)) in samples.values
    ]


def _hook_rows(contenders: Sequence[Contender], samples: Samples) -> list[Row]:
    """Return rows with the cost of one hook: most hooks minus no hooks, per hook."""
    return [
        Row.of(
            f"{contender.name}, from {most} hooks",
            differences(
                samples.overheads(contender.label(most)), samples.overheads(contender.label(0))
            ),
            bar=BAR_PER_HOOK_NS if contender.name == OURS else None,
            scale=1 / most,
        )
        for contender in contenders
        if (most := max(contender.hook_counts)) and contender.label(most) in samples.values
    ]


def _kind(settings: Settings) -> str:
    kinds = [f"accumulation over {settings.accumulate}"] if settings.accumulate > 1 else []
    kinds += ["bf16 autocast"] if settings.bf16 else []
    return f", {' and '.join(kinds)}" if kinds else ""


def _compared_with_peers(rows: Sequence[Row]) -> list[str]:
    """List the peers that are as cheap as ours or cheaper; empty without peers."""
    ratios = {row.name: row.ratio.median for row in rows if row.ratio is not None}
    notes = []
    for hook_count in (0, HOOKS):
        ours = ratios[f"{OURS}, {hook_count} hooks"]
        peers = [label for peer in PEERS if (label := peer.label(hook_count)) in ratios]
        cheaper = [label for label in peers if ratios[label] <= ours]
        if peers:
            verdict = f"NOT below {', '.join(cheaper)}" if cheaper else "below every peer measured"
            notes.append(f"With {hook_count} hooks, this trainer is {verdict}.")
    return notes
