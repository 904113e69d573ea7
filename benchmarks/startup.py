"""Time of an import, and of a training's first step.

Each sample is a separate process, and contenders take turns. An import is timed within its process,
the first step from the start of the process, including the interpreter. CPU time excludes child
processes.
"""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.pythons import HERE, Where, python_of, variables
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, interleave
from benchmarks.training_start import BEGAN_NS, FILE

BAR_CORE_MS, BAR_IMPORT, BAR_TRAINING = 150.0, 1.15, 1.15
LONGEST_S = 120
CORE, PIPELINE, REFERENCE = "robo_orchard_core", "robo_orchard_lab.pipeline", "accelerate"
CORE_CONFIG = "robo_orchard_core.utils.config"  # most of what is in it

# Module and environment of each import; each is the module used for training.
IMPORTS: Mapping[str, tuple[str, Where]] = {
    REFERENCE: ("import accelerate", "own"),
    CORE: ("import robo_orchard_core", "own"),
    CORE_CONFIG: ("import robo_orchard_core.utils.config", "own"),
    "torch": ("import torch", "own"),
    # The package imports its names on first use.
    PIPELINE: ("from robo_orchard_lab.pipeline import HookBasedTrainer", "own"),
}
PEER_IMPORTS: Mapping[str, tuple[str, Where]] = {
    REFERENCE: ("import accelerate", "own"),
    "Ignite": ("import ignite.engine", "peers"),
    "MMEngine": ("import mmengine.runner", "peers"),
    "Lightning": ("import lightning", "peers"),
    "Transformers' Trainer": ("from transformers import Trainer", "peers"),
    "RoboOrchardLab": ("import robo_orchard_lab.pipeline", "robo_orchard_lab"),
}
FIRST_STEPS: Mapping[str, tuple[str, Where]] = {
    "Accelerate, plain loop": ("accelerate_loop", "own"),
    "bare torch loop": ("bare", "own"),
    "this trainer": ("ours", "own"),
}
PEER_FIRST_STEPS: Mapping[str, tuple[str, Where]] = {
    "Accelerate, plain loop": ("accelerate_loop", "own"),
    "Ignite": ("ignite_peer", "peers"),
    "Fabric": ("fabric_peer", "peers"),
    "MMEngine": ("mmengine_peer", "peers"),
    "Lightning": ("lightning_peer", "peers"),
    "Transformers' Trainer": ("transformers_peer", "peers"),
    "RoboOrchardLab": ("robo_orchard_lab_peer", "robo_orchard_lab"),
}

BARE, SCRIPT, FROM_FILE = "bare torch script", "script with this trainer", "train FILE"


def run(*, quick: bool) -> Report:
    loads_torch = _loads_torch()
    few = (REFERENCE, CORE, PIPELINE, "Accelerate, plain loop", "this trainer")
    imports = _table(
        "Imports",
        {name: what for name, what in IMPORTS.items() if name in few or not quick},
        _import_seconds,
        rounds=1 if quick else 7,
        bars={CORE: BAR_CORE_MS, CORE_CONFIG: BAR_CORE_MS, PIPELINE: BAR_IMPORT},
        note="robo_orchard_core loads torch."
        if loads_torch
        else "robo_orchard_core loads no torch.",
    )
    steps = _table(
        "From the start of the process to the end of the first step",
        {name: what for name, what in FIRST_STEPS.items() if name in few or not quick},
        _first_step_seconds,
        rounds=1 if quick else 5,
    )
    tables = [imports, steps, *_training_tables(rounds=1 if quick else 9)]
    if not quick:
        tables += [
            _table("Imports of peers", PEER_IMPORTS, _import_seconds, rounds=2),
            _table("First steps of peers", PEER_FIRST_STEPS, _first_step_seconds, rounds=2),
        ]
    faults = ["importing robo_orchard_core loads torch"] if loads_torch else []
    return Report("startup", tables, faults, describe(DISTRIBUTIONS))


def _training_tables(rounds: int) -> list[Table]:
    """Return the tables of the wall and the CPU time of equal trainings with the usual hooks."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "experiment.yaml")
        file.write_text(FILE, "utf-8")
        programs = {
            BARE: ["-m", "benchmarks.training_start", "bare"],
            SCRIPT: ["-m", "benchmarks.training_start", "script"],
            FROM_FILE: [
                *("-m", "robo_orchard_lab", "train", str(file), "--trust", "benchmarks"),
                "--run_folder",
            ],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for round_id in range(rounds + 1):  # in turns; the first one warms up
            for name, program in programs.items():
                run_folder = [] if name == BARE else [f"{folder}/{name.split()[0]}_{round_id}"]
                times[name].append(_training_seconds([*program, *run_folder]))
    tables = []
    for place, clock in enumerate(("Wall", "CPU")):
        samples = {name: [both[place] for both in times[name][1:]] for name in programs}
        rows = [Row.of(BARE, samples[BARE], scale=1e3)]
        for reference, name in ((BARE, SCRIPT), (SCRIPT, FROM_FILE)):
            note = f"the ratio is to: {reference}"
            row = Row.of(
                *(name, samples[name]),
                reference=samples[reference],
                bar=BAR_TRAINING if clock == "Wall" else None,
                note=note,
                scale=1e3,
            )
            rows.append(row)
        title = f"{clock} time from the start to the end of the first step, with the usual hooks"
        tables.append(Table(title, "ms", rows))
    return tables


def _training_seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Return the wall and the CPU time of a training to the end of its first step."""
    printed = _output("own", *arguments, **{BEGAN_NS: str(perf_counter_ns())})
    _, wall, cpu = next(
        line for line in printed.splitlines() if line.startswith("seconds ")
    ).split()
    return float(wall), float(cpu)


def _table(
    title: str,
    contenders: Mapping[str, tuple[str, Where]],
    measure: Callable[[str, Where], float],
    *,
    rounds: int,
    bars: Mapping[str, float] | None = None,
    note: str = "",
) -> Table:
    reference = next(iter(contenders))
    timed: dict[str, Callable[[], float]] = {}
    absent: list[Row] = []
    for name, (what, where) in contenders.items():
        why = _why_not(measure, what, where)
        if why is None:
            timed[name] = partial(measure, what, where)
        else:
            absent.append(Row(name, note=f"not measured: {why}"))
    # Where there are few rounds, each was tried already, or it is a rough answer.
    samples = interleave(timed, reference=reference, rounds=rounds, warm_up=rounds > 2)
    rows = [_row(name, samples, bars or {}) for name in samples.values]
    return Table(title, "ms", [*rows, *absent], [note] if note else [])


def _row(name: str, samples: Samples, bars: Mapping[str, float]) -> Row:
    """Return a row; the core's bar is in seconds, not a ratio."""
    reference = None if name in (CORE, CORE_CONFIG) else samples.references.get(name)
    return Row.of(name, samples.values[name], reference=reference, bar=bars.get(name), scale=1e3)


def _why_not(measure: Callable[[str, Where], float], what: str, where: Where) -> str | None:
    """Return why a contender can't be measured here, in one line."""
    if where == "own":
        return None
    if python_of(where) is None:
        return "needs the environment that peers.sh builds"
    try:
        measure(what, where)
    except subprocess.CalledProcessError as error:
        return (str(error.stderr).strip().splitlines() or ["failed"])[-1]
    return None


def _import_seconds(statement: str, where: Where) -> float:
    program = (
        f"import time; begin = time.perf_counter(); {statement}; "
        "print('\\nseconds', time.perf_counter() - begin)"
    )
    return _seconds_told_by(where, "-c", program)


def _first_step_seconds(module: str, where: Where) -> float:
    return _seconds_told_by(where, "-m", "benchmarks.first_step", module, str(perf_counter_ns()))


def _seconds_told_by(where: Where, *arguments: str) -> float:
    lines = _output(where, *arguments).splitlines()
    told = next(line for line in reversed(lines) if line.startswith("seconds "))
    return float(told.removeprefix("seconds "))


def _loads_torch() -> bool:
    program = f"import sys, {CORE_CONFIG}; print('torch' in sys.modules)"
    return _output("own", "-c", program).strip() == "True"


def _output(where: Where, *arguments: str, **variable: str) -> str:
    python = python_of(where)
    assert python is not None  # unsupported contenders were left out
    return subprocess.run(
        [python, *arguments],
        cwd=HERE.parent,
        env=variables(where) | variable,
        capture_output=True,
        text=True,
        check=True,
        timeout=LONGEST_S,
    ).stdout
