"""Cost of the HookProfiler in the step of a tiny model.

The cost is the difference to the same trainer without the profiler, in the same turn. The bar is a
share of that trainer's step.
"""

from benchmarks.environment import describe
from benchmarks.overhead import BARE, HOOKS, OURS, Contender, step_rows, time_steps
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread, differences, ratios
from benchmarks.workload import Settings

PROFILED = f"{OURS}, profiled"
BAR = 0.05  # of this trainer's step

CONTENDERS = (
    Contender(BARE, "bare", (0,)),
    Contender(OURS, "ours", (0, HOOKS)),
    Contender(PROFILED, "ours_profiled", (0, HOOKS)),
)


def run(*, quick: bool) -> Report:
    settings = Settings(steps=500 if quick else 2000)
    timed = time_steps(settings, CONTENDERS, rounds=3 if quick else 13)
    samples, added = timed.samples, []
    for plain, profiled in zip(CONTENDERS[1].hook_counts, CONTENDERS[2].hook_counts, strict=True):
        ours, measured = CONTENDERS[1].label(plain), CONTENDERS[2].label(profiled)
        more = differences(samples.overheads(measured), samples.overheads(ours))
        added.append(
            Row(
                f"HookProfiler, {plain} other hooks",
                Spread.of([nanoseconds * 1e-3 for nanoseconds in more]),
                Spread.of(ratios(more, samples.values[ours])),
                BAR,
            )
        )
    tables = [
        Table(
            "One step", "us per step", step_rows(CONTENDERS, samples, {}), [timed.weights_note()]
        ),
        Table(
            "What the profiler adds to a step",
            "us per step; the ratio is to this trainer's step",
            added,
        ),
    ]
    return Report("profiling", tables, timed.faults(), describe(["robo-orchard-hooks", "torch"]))
