"""Overhead of the default logging on the step of a tiny model, compared with two peers.

Ours: loss, run statistics, progress as lines in a file, and a JSON line every 50 steps. Lightning:
default loggers and progress bar, with the loss logged. Transformers: default log and progress bar,
every 50 steps. Progress is written to a file.
"""

from collections.abc import Sequence

from benchmarks.environment import describe
from benchmarks.overhead import BARE, DISTRIBUTIONS, OURS, Contender, step_rows, time_steps
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, Spread, differences, ratios
from benchmarks.workload import Settings

LOG_EVERY_STEPS = 50  # so each timed block has one logging point
BAR = 0.10  # of the bare loop's step
LOGGING = "with default logging"

OWN = (
    Contender(BARE, "bare", (0,)),
    Contender(OURS, "ours", (0,)),
    Contender(f"{OURS}, {LOGGING}", "ours_observed", (0,)),
)
PEERS = (
    Contender("Lightning", "lightning_peer", (0,), peer=True),
    Contender(f"Lightning, {LOGGING}", "lightning_observed", (0,), peer=True),
    Contender("Transformers' Trainer", "transformers_peer", (0,), peer=True),
    Contender(f"Transformers' Trainer, {LOGGING}", "transformers_observed", (0,), peer=True),
)


def run(*, quick: bool) -> Report:
    contenders = OWN if quick else OWN + PEERS
    settings = Settings(steps=500 if quick else 3000, block_steps=LOG_EVERY_STEPS)
    timed = time_steps(settings, contenders, rounds=2 if quick else 11)
    samples = timed.samples
    added = [
        _added(contender.name, samples)
        for contender in contenders
        if f"{contender.name}, {LOGGING}" in samples.values and contender.name in samples.values
    ]
    tables = [
        Table(
            "One step",
            "us per step",
            [*step_rows(contenders, samples, {}), *timed.absent],
            [timed.weights_note()],
        ),
        Table(
            "What default logging adds to a step",
            "us per step; the ratio is to the bare loop's step",
            added,
            _compared_with_peers(added),
        ),
    ]
    return Report("observing", tables, timed.faults(), describe(DISTRIBUTIONS))


def _added(name: str, samples: Samples) -> Row:
    observed = f"{name}, {LOGGING}"
    more = differences(samples.overheads(observed), samples.overheads(name))
    return Row(
        name,
        Spread.of([nanoseconds * 1e-3 for nanoseconds in more]),
        Spread.of(ratios(more, samples.references[observed])),
        BAR if name == OURS else None,
    )


def _compared_with_peers(added: Sequence[Row]) -> list[str]:
    costs = {row.name: row.value.median for row in added if row.value is not None}
    peers = [name for name in costs if name != OURS]
    cheaper = [name for name in peers if costs[name] <= costs[OURS]]
    if not peers:
        return []
    verdict = f"NOT below that of {', '.join(cheaper)}" if cheaper else "below each peer's"
    return [f"What this trainer's logging adds is {verdict}."]
