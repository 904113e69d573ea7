"""Scripts in separate processes, such as the ranks of a job."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import coverage
import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch.distributed

from fork_server import run_job

HELPERS = Path(__file__).parent
"""Folder of the modules that tests and their scripts import."""

SCRIPTS = Path(__file__).parent.parent / "scripts"
"""Folder of the scripts that tests start in processes of their own."""


def command(
    script: Path | str, *arguments: object, processes: int = 2, restarts: int = 0
) -> list[str]:
    """Return the command of a script, run by torchrun if `processes` > 1."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ranks += [f"--max-restarts={restarts}"] if restarts else []
    return [
        *(sys.executable, *(ranks if processes > 1 else [])),
        *(str(script), *map(str, arguments)),
    ]


def coverage_settings() -> dict[str, str] | None:
    """Return the settings that measure a script's coverage with this process's."""
    current = coverage.Coverage.current()
    if current is None:
        return None
    data_file = os.path.abspath(current.config.data_file)
    return {"config_file": str(current.config.config_file), "data_file": data_file}


def environment() -> dict[str, str]:
    """Return an environment with this process's import path and one thread per process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def launch(
    script: Path | str,
    *arguments: object,
    processes: int = 2,
    timeout_s: float = 180,
    fails: bool = False,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script and check its exit code: zero unless ``fails``.

    By default, the processes are forks of a server that has imported torch, in the environment of
    torchrun; see `fork_server`. With ``TEST_LAUNCHER=torchrun``, torchrun starts them; so do tests
    of torchrun itself, by `command`. The processes run in `folder`, by default the current one.
    """
    folder = folder or Path.cwd()
    if os.environ.get("TEST_LAUNCHER") == "torchrun":
        done = subprocess.run(
            command(script, *arguments, processes=processes),
            env=environment(),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    else:
        done = _launch_forks(script, arguments, processes, timeout_s, folder)
    assert (done.returncode != 0) == fails, done.stderr
    return done


def _launch_forks(
    script: Path | str,
    arguments: Sequence[object],
    processes: int,
    timeout_s: float,
    folder: Path,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        codes = run_job(
            Path(script),
            [*map(str, arguments)],
            environment(),
            processes,
            timeout_s,
            output,
            folder,
            coverage_settings(),
        )
        stdout, stderr = (
            (output / each).read_text(encoding="utf-8", errors="replace")
            for each in ("stdout", "stderr")
        )
    return subprocess.CompletedProcess([str(script)], max(codes, key=abs), stdout, stderr)


def has_ended(process: psutil.Process) -> bool:
    """Return True if a process has ended, also as a zombie without a parent."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


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
