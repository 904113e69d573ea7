"""Step time of RoboOrchardLab, whose training system this project reimplements.

RoboOrchardLab has its own environment, since the import names are equal. There, its step is
compared with the bare loop's and Accelerate's, as this trainer's is in `overhead`.
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
    """Return True if the import names are RoboOrchardLab's; elsewhere they are this project's."""
    try:
        version("robo-orchard-lab")
    except PackageNotFoundError:
        return False
    return True
