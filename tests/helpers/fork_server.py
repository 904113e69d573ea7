"""Server that runs scripts in forks of a process that has imported torch.

Importing torch and the project costs a process 4 s, more than most jobs of the tests. A fork
starts at once, and ends as a script does: with its exit functions and an exit code.

`run_job` sends a job to the server of this process, and waits for its end.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

PRELOADED = [
    "coverage",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "accelerate",
    "torchmetrics",
    "robo_orchard_lab.experiment",
    "robo_orchard_lab.testing",
]
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the server ignores: tests send them to all processes they have started."""
GRACE_S = 30.0
"""Time between SIGTERM, sent when another rank has failed, and SIGKILL; as torchrun."""


def run_job(
    script: Path,
    arguments: list[str],
    environment: dict[str, str],
    processes: int,
    timeout_s: float,
    output: Path,
    folder: Path,
    coverage: dict[str, str] | None = None,
) -> list[int]:
    """Run a script on `processes` ranks, with the environment of torchrun if there are several.

    Args:
        output: folder for the files ``stdout`` and ``stderr``, common to all ranks.
        folder: working directory of the ranks.
        coverage: arguments of `coverage.Coverage`, to measure the ranks.

    Returns:
        list[int]: exit code of each rank; negative for a signal.

    Raises:
        TimeoutError: the ranks have not ended in `timeout_s` seconds, and were killed.
    """
    server = _server()
    job = {
        "script": str(script),
        "arguments": arguments,
        "environment": environment,
        "processes": processes,
        "timeout_s": timeout_s,
        "output": str(output),
        "coverage": coverage,
        "folder": str(folder),
        "path": sys.path,
    }
    server.stdin.write(json.dumps(job).encode() + b"\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    if codes is None:
        raise TimeoutError(f"{script} ran longer than {timeout_s} s; output is in {output}")
    return list(codes)


@functools.cache
def _server() -> Any:
    """Start the server of this process; it ends with this process."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # type: ignore[union-attr]
    return server


def serve(requests: IO[bytes], replies: IO[bytes]) -> dict[str, Any] | None:
    """Run jobs until the requests end. Return None in the server, and the job in its ranks."""
    for line in iter(requests.readline, b""):
        job: dict[str, Any] = json.loads(line)
        store = keep_store() if job["processes"] > 1 else None
        ranks: dict[int, int] = {}
        for rank in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                _enter(job, rank, store[1] if store else None)
                return job
            ranks[pid] = rank
        codes = _wait(ranks, time.monotonic() + job["timeout_s"])
        if store:
            os.kill(store[0], signal.SIGKILL)
            os.waitpid(store[0], 0)
        replies.write(json.dumps(codes).encode() + b"\n")
        replies.flush()
    return None


def keep_store() -> tuple[int, int]:
    """Start a process that keeps a store, as torchrun does; return its id and port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented

    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writes, str(store.port).encode())
        while os.getppid() != 1:
            time.sleep(1)
        os._exit(0)
    port = int(os.read(reads, 10))
    os.close(reads)
    os.close(writes)
    return pid, port


def _enter(job: dict[str, Any], rank: int, port: int | None) -> None:
    """Make a fork look like a new process that runs the script."""
    os.setsid()
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        file = os.open(Path(job["output"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path = [str(Path(job["script"]).parent), *job["path"]]
    if port is not None:
        world_size = str(job["processes"])
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    if job["coverage"] is not None:
        from coverage import Coverage

        measured = Coverage(**job["coverage"], data_suffix=True)
        # The server has imported the modules, and a script may run no line of them.
        measured.set_option("run:disable_warnings", ["module-not-measured", "no-data-collected"])
        measured.start()
        atexit.register(measured.save)
        atexit.register(measured.stop)


def _wait(ranks: dict[int, int], deadline: float) -> list[int] | None:
    """Wait for all ranks and return their exit codes, or None after the deadline.

    SIGTERM ends the other ranks when one has failed, as torchrun does.
    """
    codes: dict[int, int] = {}
    terminated_at = None
    while len(codes) < len(ranks):
        time.sleep(0.005)
        for pid in ranks.keys() - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if terminated_at is None and any(codes.values()):
            terminated_at = time.monotonic()
            _send(signal.SIGTERM, ranks.keys() - codes.keys())
        now = time.monotonic()
        if now > deadline or (terminated_at is not None and now > terminated_at + GRACE_S):
            _send(signal.SIGKILL, ranks.keys() - codes.keys())
    return None if time.monotonic() > deadline else [codes[pid] for pid in ranks]


def _send(number: int, processes: Iterable[int]) -> None:
    """Send a signal to processes that the server has not waited for."""
    for pid in processes:
        os.kill(pid, number)


if __name__ == "__main__":
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    for module in PRELOADED:
        importlib.import_module(module)
    if (own_job := serve(sys.stdin.buffer, sys.stdout.buffer)) is not None:
        runpy.run_path(own_job["script"], run_name="__main__")
