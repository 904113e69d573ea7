"""The benchmarks by name. One line here and one module make a new one."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from benchmarks.report import Report


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this package with a `run(*, quick: bool) -> Report`."""

    name: str
    summary: str
    beside_peers: bool = False
    """Whether it is worth running in the environment that peers.sh builds."""

    def run(self, *, quick: bool) -> Report:
        """Measures in this process; `quick` trades precision for seconds."""
        module: ModuleType = importlib.import_module(f"benchmarks.{self.name}")
        report: Report = module.run(quick=quick)
        return report


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("dispatch", "N hooks on one channel against calling their methods in a loop"),
        Benchmark("overhead", "a tiny model's step, by this trainer and its peers", True),
        Benchmark("observing", "what default logging adds to a step, beside two peers'", True),
        Benchmark("accumulation", "the same, accumulating gradients over 4 batches"),
        Benchmark("checkpoints", "saving and loading a model and its optimizer, beside others"),
        Benchmark("bf16", "the same, under bf16 autocast"),
        Benchmark("loading", "an exact data order against the plain loader; a resume"),
    )
}
