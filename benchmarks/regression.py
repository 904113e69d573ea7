"""Short subset for CI:

`python -m benchmarks.regression` fails if speed was lost. A few ratios are compared with
stored_ratios.json; the exit status is 1 if a ratio is more than 25 % above the median stored there.
`--store` measures each ratio five times and stores all of them: their range is the noise, which the
message of a loss names. A ratio uses the fastest of many short blocks of each contender, in turns,
by processor time (`dispatch`: wall time), since other processes only ever add time. A loss is
measured twice before it counts.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from statistics import median
from time import thread_time_ns

import torch

from benchmarks.contenders import bare, ours, ours_observed, ours_profiled
from benchmarks.dispatch import bare_and_channel
from benchmarks.pythons import HERE, variables
from benchmarks.timing import ns_per_call
from benchmarks.workload import Job, Settings

STORED = HERE / "stored_ratios.json"
ALLOWED = 1.25
"""How much of a stored ratio a new one may be."""
ROUNDS = 15
STORED_MEASUREMENTS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description=__doc__)
    parser.add_argument("--store", action="store_true", help=f"write benchmarks/{STORED.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with suppress(AttributeError, PermissionError):  # not on every system
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # before other processes
    if arguments.store:
        found = {
            name: sorted(round(measure(), 3) for _ in range(STORED_MEASUREMENTS))
            for name, measure in MEASURED.items()
        }
        lines = (f"  {json.dumps(name)}: {ratios}" for name, ratios in found.items())
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(STORED.read_text(encoding="utf-8"), end="")
        return 0
    lost = compare(MEASURED, json.loads(STORED.read_text(encoding="utf-8")))
    print(*lost or ["as fast as stored"], sep="\n")
    return 1 if lost else 0


def compare(
    measured: Mapping[str, Callable[[], float]], stored: Mapping[str, float | Sequence[float]]
) -> list[str]:
    """Return a line per ratio that is slower than allowed in two measurements."""
    lost = []
    for name, measure in measured.items():
        given = stored[name]
        ratios = [given] if isinstance(given, float) else given
        before = median(ratios)
        found = measure()
        if found > before * ALLOWED:
            found = min(found, measure())
        if found > before * ALLOWED:
            spread = f" ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} measurements)"
            known = f"{before:.3f}{spread if len(ratios) > 1 else ''}"
            lost.append(f"{name}: {found:.3f}, stored as {known}, {found / before - 1:.0%} more")
    return lost


def dispatch() -> float:
    """Return the ratio of ten hooks on a channel to the same calls in a loop."""
    plain, channel = bare_and_channel(10)
    pairs = [
        (ns_per_call(plain, calls=200), ns_per_call(channel, calls=200)) for _ in range(ROUNDS)
    ]
    return _fastest(pairs)


def step(train: Callable[[Job], None]) -> float:
    """Return the ratio of one step to the bare loop's."""
    settings = Settings(steps=300, block_steps=50)

    def fastest(contender: Callable[[Job], None]) -> float:
        job = Job(settings)
        job.model.clock = thread_time_ns
        contender(job)
        return job.ns_per_step(quantile=0.05)

    fastest(train)  # pays for one-time imports
    pairs = [(fastest(partial(bare.train, hook_count=0)), fastest(train)) for _ in range(ROUNDS)]
    return _fastest(pairs)


def importing() -> float:
    """Return the ratio of the trainer's import to Accelerate's, by processor time."""
    # The package imports its names on first use.
    statements = (
        "import accelerate",
        "from robo_orchard_lab.pipeline import HookBasedTrainer",
    )
    pairs = [(_import_seconds(statements[0]), _import_seconds(statements[1])) for _ in range(2)]
    return _fastest(pairs)


def _fastest(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the ratio of the second contender's minimum to the first's."""
    return min(second for _, second in pairs) / min(first for first, _ in pairs)


def _import_seconds(statement: str) -> float:
    program = f"import time; {statement}; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE.parent,
        env=variables("own"),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


MEASURED: dict[str, Callable[[], float]] = {
    "dispatch of 10 hooks": dispatch,
    "step without hooks": partial(step, partial(ours.train, hook_count=0)),
    "step with 10 hooks": partial(step, partial(ours.train, hook_count=10)),
    "step with default logging": partial(step, partial(ours_observed.train, hook_count=0)),
    "step with the profiler": partial(step, partial(ours_profiled.train, hook_count=0)),
    "import of the trainer": importing,
}

if __name__ == "__main__":
    sys.exit(main())
