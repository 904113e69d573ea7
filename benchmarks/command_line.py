"""Time of the command line's help and of an inventory, including the start of the interpreter.

Each sample is a separate process; the reference is an interpreter that does nothing.
"""

import subprocess
from functools import partial
from time import perf_counter

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.pythons import HERE, python_of, variables
from benchmarks.report import Report, Row, Table
from benchmarks.timing import interleave

BAR_MS = 600.0
LONGEST_S = 120
REFERENCE = "an interpreter that does nothing"

PROGRAM = """
import sys
from robo_orchard_lab.cli.main import main
code = main()
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""

HELP = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "hooks list --help": ["hooks", "list", "--help"],
    "hooks list": ["hooks", "list"],
}


def run(*, quick: bool) -> Report:
    commands = {REFERENCE: ["-c", "pass"]}
    commands |= {name: ["-c", PROGRAM, *arguments] for name, arguments in HELP.items()}
    samples = interleave(
        {name: partial(_seconds, arguments) for name, arguments in commands.items()},
        reference=REFERENCE,
        rounds=1 if quick else 15,
    )
    rows = [
        Row.of(name, values, bar=None if name == REFERENCE else BAR_MS, scale=1e3)
        for name, values in samples.values.items()
    ]
    faults = [
        f"{name} imports torch" for name, arguments in HELP.items() if _loads_torch(arguments)
    ]
    note = "None of them imports torch." if not faults else "; ".join(faults)
    table = Table("Help and inventories of the command line", "ms", rows, [note])
    return Report("command_line", [table], faults, describe(DISTRIBUTIONS))


def _seconds(arguments: list[str]) -> float:
    began_at = perf_counter()
    _ended(arguments)
    return perf_counter() - began_at


def _loads_torch(arguments: list[str]) -> bool:
    return _ended(["-c", PROGRAM, *arguments]).stderr.strip().endswith("True")


def _ended(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    python = python_of("own")
    assert python is not None  # it is this one
    return subprocess.run(
        [python, *arguments],
        cwd=HERE.parent,
        env=variables("own"),
        capture_output=True,
        text=True,
        check=True,
        timeout=LONGEST_S,
    )
