"""Scripts in separate processes, such as the ranks of a job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import coverage
import torch.distributed

HELPERS = Path(__file__).parent
"""Folder of the modules that tests and their scripts import."""

SCRIPTS = Path(__file__).parent.parent / "scripts"
"""Folder of the scripts that tests start in processes of their own."""


def command(
    script: Path | str,
    *arguments: object,
    processes: int = 2,
    restarts: int = 0,
    measured: bool = False,
) -> list[str]:
    """Return the command of a script, run by torchrun if `processes` > 1.

    With ``measured``, the script counts for test coverage if coverage is being measured.
    """
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ranks += [f"--max-restarts={restarts}"] if restarts else []
    return [
        *(sys.executable, *(ranks if processes > 1 else [])),
        *(_measuring() if measured else []),
        *(str(script), *map(str, arguments)),
    ]


def _measuring() -> list[str]:
    """Return the interpreter options that measure a script's coverage with this process's."""
    current = coverage.Coverage.current()
    if current is None:
        return []
    data_file = os.path.abspath(current.config.data_file)
    settings = [f"--rcfile={current.config.config_file}", f"--data-file={data_file}"]
    return ["-m", "coverage", "run", "--parallel-mode", *settings]


def environment() -> dict[str, str]:
    """Return an environment with this process's import path and one thread per process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def launch(
    script: Path | str,
    *arguments: object,
    processes: int = 2,
    timeout_s: float = 180,
    fails: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a script and check its exit code: zero unless ``fails``."""
    done = subprocess.run(
        command(script, *arguments, processes=processes, measured=True),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done


def without_greetings(output: str) -> str:
    """Drop the lines that gloo in torch 2.8 prints for each process group."""
    lines = output.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo] Rank "))


def end_group() -> None:
    """Destroy the process group of a script without a trainer.

    A process that exits within half a second of gloo's first exchange may be aborted.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(1)
