"""Size of an installation besides torch and its requirements: distributions and bytes.

The figures come from the requirements of the distributions in existing environments.
"""

import json
import subprocess
from typing import Any

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.pythons import HERE, Where, python_of, variables
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread

BAR = 25.0
OURS = "this project"

ROOTS: dict[str, tuple[str, Where]] = {
    OURS: ("robo-orchard-hooks", "own"),
    "Accelerate": ("accelerate", "own"),
    "Ignite": ("pytorch-ignite", "peers"),
    "MMEngine": ("mmengine", "peers"),
    "Lightning": ("lightning", "peers"),
    "Transformers, for its Trainer": ("transformers[torch]", "peers"),
    "RoboOrchardLab": ("robo-orchard-lab", "robo_orchard_lab"),
}


def run(*, quick: bool) -> Report:
    counts, sizes = [], []
    for name, (root, where) in ROOTS.items():
        if quick and where != "own":
            continue
        found = _installed(root, where)
        if "missing" in found:
            counts.append(Row(name, note=f"not measured: {found['missing']}"))
            continue
        brought: dict[str, int] = found["distributions"]
        bar = BAR if name == OURS else None
        counts.append(Row(name, _exactly(len(brought)), bar=bar, note=", ".join(_largest(brought))))
        sizes.append(Row(name, _exactly(sum(brought.values()) / 1e6)))
    tables = [
        Table("Distributions, its own included", "count", counts, ["The largest are named."]),
        Table("Their files", "MB", sizes),
    ]
    return Report("footprint", tables, environment=describe(DISTRIBUTIONS))


def _exactly(number: float) -> Spread:
    return Spread(number, number, number)


def _largest(sizes: dict[str, int], count: int = 3) -> list[str]:
    return sorted(sizes, key=lambda name: -sizes[name])[:count]


def _installed(root: str, where: Where) -> dict[str, Any]:
    python = python_of(where)
    if python is None:
        return {"missing": "needs the environment that peers.sh builds"}
    done = subprocess.run(
        [python, "-m", "benchmarks.installed", root],
        cwd=HERE.parent,
        env=variables(where),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"missing": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)[root]
    return found
