"""Environments of benchmarks; `peers.sh` builds the environments besides the project's own."""

import os
import sys
from pathlib import Path
from typing import Literal, TypeAlias

Where: TypeAlias = Literal["own", "peers", "robo_orchard_lab", "lerobot"]

HERE = Path(__file__).resolve().parent
_FOLDERS = {
    "peers": ".venv-peers",
    "robo_orchard_lab": ".venv-robo-orchard-lab",
    "lerobot": ".venv-lerobot",
}

# Eight tiny matrix products per step: more threads only add noise.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def python_of(where: Where) -> str | None:
    """Return the interpreter of an environment, or None if not built."""
    if where == "own":
        return sys.executable
    built_in = Path(os.environ.get("BENCHMARKS_ENVIRONMENTS", HERE))
    path = built_in / _FOLDERS[where] / "bin" / "python"
    return str(path) if path.exists() else None


def variables(where: Where) -> dict[str, str]:
    """Return the environment variables of a process: one thread, compiled modules kept."""
    kept = {**os.environ, **_ONE_THREAD}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start compiles uninstalled modules
    if where == "robo_orchard_lab":
        kept.pop("PYTHONPATH", None)  # its import names equal ours
    return kept
