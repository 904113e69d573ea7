"""Time of the command line's help, lists and checks, including the start of the interpreter.

Each sample is a separate process; the reference is an interpreter that does nothing. The lists are
of a folder with 50 runs, and of the checkpoints of one run. `config check` prints the mistakes that
need no import first: the time to its first line is measured.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, perf_counter_ns

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.pythons import HERE, variables
from benchmarks.report import Report, Row, Table
from benchmarks.timing import interleave
from benchmarks.training_start import BEGAN_NS, FILE

BAR_MS = 600.0
LONGEST_S = 120
RUNS = 50
PYTHON = sys.executable
REFERENCE = "an interpreter that does nothing"

PROGRAM = """
import sys
from robo_orchard_lab.cli.main import main
code = main()
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""

TRUST = ["--trust", "benchmarks"]
IN_FULL = "config check FILE, in full"  # imports the classes that the file names
FIRST_LINE = "config check FILE, first line of a mistake"
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "hooks list --help": ["hooks", "list", "--help"],
    "hooks list": ["hooks", "list"],
    "checkpoint list RUN": ["checkpoint", "list", "runs/0"],
    f"runs FOLDER, {RUNS} runs": ["runs", "runs"],
    "train FILE, refused for a misspelled field": ["train", "misspelled.yaml", *TRUST],
    "train FILE, refused for a wrong value": ["train", "wrong.yaml", *TRUST],
    FIRST_LINE: ["config", "check", "wrong.yaml", *TRUST],
    IN_FULL: ["config", "check", "experiment.yaml", *TRUST],
}


def run(*, quick: bool) -> Report:
    with TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        processes = {REFERENCE: ["-c", "pass"]}
        processes |= {name: ["-c", PROGRAM, *arguments] for name, arguments in COMMANDS.items()}
        samples = interleave(
            {
                name: partial(_first_line_s if name == FIRST_LINE else _seconds, arguments, folder)
                for name, arguments in processes.items()
            },
            reference=REFERENCE,
            rounds=1 if quick else 15,
        )
        torch_is_loaded = [name for name in COMMANDS if _loads_torch(processes[name], folder)]
    rows = [
        Row.of(name, values, bar=None if name == REFERENCE else BAR_MS, scale=1e3)
        for name, values in samples.values.items()
    ]
    faults = [f"{name} imports torch" for name in torch_is_loaded if "config check" not in name]
    note = f"Torch is imported by: {'; '.join(torch_is_loaded)}. No other command imports it."
    table = Table("Commands of the command line", "ms", rows, [note])
    return Report("command_line", [table], faults, describe(DISTRIBUTIONS))


def _prepare(folder: Path) -> None:
    """Write experiment files and 50 runs, which are copies of a trained one."""
    wrong = {"experiment": ("", ""), "misspelled": ("max_epoch", "max_epochs")}
    wrong["wrong"] = ("max_epoch: 1", "max_epoch: one")
    for name, change in wrong.items():
        Path(folder, f"{name}.yaml").write_text(FILE.replace(*change), "utf-8")
    train = ["-m", "robo_orchard_lab", "train", "experiment.yaml", *TRUST]
    _ended([*train, "--run_folder", "runs/0"], folder)
    for number in range(1, RUNS):
        shutil.copytree(folder / "runs/0", folder / f"runs/{number}")


def _seconds(arguments: Sequence[str], folder: Path) -> float:
    began_at = perf_counter()
    _ended(arguments, folder)
    return perf_counter() - began_at


def _first_line_s(arguments: Sequence[str], folder: Path) -> float:
    """Return the seconds to the first line of the output; the process is then ended."""
    began_at = perf_counter()
    with subprocess.Popen(
        [PYTHON, *arguments], cwd=folder, env=_variables(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ended_at = perf_counter()
        process.kill()
    return ended_at - began_at


def _loads_torch(arguments: Sequence[str], folder: Path) -> bool:
    return _ended(arguments, folder).stderr.strip().endswith("True")


def _variables() -> dict[str, str]:
    kept = variables("own") | {BEGAN_NS: str(perf_counter_ns())}
    kept["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), kept.get("PYTHONPATH", "")])
    return kept


def _ended(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PYTHON, *arguments],
        cwd=folder,
        env=_variables(),
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    if done.returncode not in (0, 2):  # 2 of a file with errors
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done
