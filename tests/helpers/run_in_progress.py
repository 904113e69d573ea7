"""A run in progress in another process, for tests of what reads its folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_S = 60.0
_SCRIPT = Path(__file__).parents[1] / "scripts" / "run_until_killed.py"


@contextmanager
def run_in_progress(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Train in a run folder in another process until the body exits; the folder has metrics."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(_SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_steps(folder, 14, process)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until metrics.jsonl has a record for each of the first steps."""
    metrics, ends_at = folder / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert process.poll() is None
        assert time.monotonic() < ends_at
        time.sleep(0.02)
