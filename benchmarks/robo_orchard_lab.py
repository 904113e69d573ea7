"""The step of RoboOrchardLab, whose training system this project implements anew.

It has an environment of its own, since the import names are the same; so it is compared there with
the bare loop and Accelerate's, as this trainer is in `overhead`.
"""

from importlib.metadata import PackageNotFoundError, version

from benchmarks.environment import describe
from benchmarks.overhead import BARE, Contender, step_rows, time_steps
from benchmarks.report import Report, Row, Table
from benchmarks.workload import Settings

NAME = "RoboOrchardLab"
CONTENDERS = (
    Contender(BARE, "bare", (0,)),
    Contender("Accelerate, plain loop", "accelerate_loop", (0,)),
    Contender(NAME, "robo_orchard_lab_peer", peer=True),
)


def run(*, quick: bool) -> Report:
    environment = describe(("robo-orchard-lab", "torch", "accelerate", "transformers"))
    if not _is_installed():
        row = Row(NAME, note="not measured: runs where peers.sh has built its environment")
        return Report("robo_orchard_lab", [Table("One step", "us", [row])], (), environment)
    timed = time_steps(Settings(steps=500 if quick else 2000), CONTENDERS, rounds=11)
    rows = [*step_rows(CONTENDERS, timed.samples, {}), *timed.absent]
    table = Table("One step", "us per step", rows, [timed.weights_note()])
    return Report("robo_orchard_lab", [table], timed.faults(), environment)


def _is_installed() -> bool:
    """Elsewhere the names that its contender imports are this project's."""
    try:
        version("robo-orchard-lab")
    except PackageNotFoundError:
        return False
    return True
