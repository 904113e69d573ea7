"""Benchmarks by name. A new benchmark is one line here and one module."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from benchmarks.pythons import Where
from benchmarks.report import Report


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this package with a `run(*, quick: bool) -> Report`."""

    name: str
    summary: str
    where: Where = "own"
    """The environment that its process belongs in, where that is built and it is not quick."""

    def run(self, *, quick: bool) -> Report:
        """Measure in this process; `quick` trades precision for seconds."""
        module: ModuleType = importlib.import_module(f"benchmarks.{self.name}")
        report: Report = module.run(quick=quick)
        return report


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("dispatch", "N hooks on one channel against calling their methods in a loop"),
        Benchmark("overhead", "a tiny model's step, by this trainer and its peers", "peers"),
        Benchmark(
            "robo_orchard_lab", "the same by RoboOrchardLab, in its own place", "robo_orchard_lab"
        ),
        Benchmark("observing", "what default logging adds to a step, beside two peers'", "peers"),
        Benchmark("profiling", "what the HookProfiler adds to a tiny step"),
        Benchmark("accumulation", "a tiny step, accumulating gradients over 4 batches"),
        Benchmark("bf16", "a tiny step, under bf16 autocast"),
        Benchmark("two_processes", "a tiny step in two processes, which exchange gradients"),
        Benchmark(
            "evaluation", "a pass over a set with a metric, beside a loop and peers", "peers"
        ),
        Benchmark("checkpoints", "saving and loading a model and its optimizer, beside others"),
        Benchmark("loading", "an exact data order against the plain loader; a resume"),
        Benchmark("robot_data", "reading LeRobot datasets, beside lerobot's reader", "lerobot"),
        Benchmark("end_to_end", "complete trainings, beside a plain loop and peers"),
        Benchmark("startup", "imports, and the time to the end of the first step, beside peers'"),
        Benchmark("command_line", "how long one waits for help, lists and checks of files"),
        Benchmark("footprint", "distributions and bytes that an installation brings"),
        Benchmark("many_ranks", "the protocols of a job by its ranks, simulated up to 4,096"),
        Benchmark("large_folders", "many saves, metric records, epochs and parameters"),
        Benchmark("endurance", "memory and time of a step over 10,000 steps with every hook on"),
    )
}
