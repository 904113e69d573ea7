"""Launch pairs of ranks as torchrun does, each a fork of this process.

``python pairs.py FOLDER CASE...`` runs ``fails_on_ranks.py`` for each case: a position and, after a
``+``, options. ``FOLDER/CASE.json`` then describes the end of the ranks.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it

import fails_on_ranks
from fork_server import keep_store
from launching import has_ended

LONGEST_S = 90.0


def run_pair(folder: Path, case: str) -> dict[str, Any]:
    """Run both ranks to their end, and terminate the second after the first has failed."""
    place, _, options = case.partition("+")
    keeper, port = keep_store()
    failed_at = folder / f"{case}.failed_at"
    ranks = [
        fork(
            lambda: fails_on_ranks.main(folder / case, place, options),
            folder / f"{case}.{rank}.txt",
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2,
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
            TORCHELASTIC_USE_AGENT_STORE="True",
            FAILED_AT=failed_at,
        )
        for rank in range(2)
    ]
    started: set[psutil.Process] = set()
    codes: dict[int, int] = {}
    began_at = time.monotonic()
    terminated = False
    while len(codes) < 2:
        for rank, pid in enumerate(ranks):
            if rank in codes:
                continue
            with suppress(psutil.NoSuchProcess):
                started.update(psutil.Process(pid).children(recursive=True))
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        if not terminated and any(codes.values()):
            terminated = True
            for rank in {0, 1} - set(codes):
                os.kill(ranks[rank], signal.SIGTERM)
        if time.monotonic() - began_at > LONGEST_S:
            for rank in {0, 1} - set(codes):
                os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(0.02)
    took_s = time.monotonic() - float(failed_at.read_text()) if failed_at.exists() else math.inf
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    left_at = time.monotonic() + 8  # a worker detects its dead parent after 5 s
    while (
        left := [each for each in started if not has_ended(each)]
    ) and time.monotonic() < left_at:
        time.sleep(0.1)
    return {
        "codes": [codes[rank] for rank in range(2)],
        "seconds": took_s,
        "orphans": [process.pid for process in left],
        "outputs": [(folder / f"{case}.{rank}.txt").read_text() for rank in range(2)],
    }


def fork(do: Any, output: Path, **environment: object) -> int:
    """Fork a process that calls `do` and exits with its interpreter."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {name: str(value) for name, value in environment.items()}
    do()
    sys.exit(0)


if __name__ == "__main__":
    to = Path(sys.argv[1])
    for each in sys.argv[2:]:
        (to / f"{each}.json").write_text(json.dumps(run_pair(to, each)))
