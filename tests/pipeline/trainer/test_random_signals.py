"""Signals to processes of a run at random instants, until it is completed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launching import SCRIPTS
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from tiny import equal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start(folder: Path, ranks: int, number: int) -> list[subprocess.Popen[str]]:
    """Start all ranks, each as the leader of a process group."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    meeting = folder.with_name(f"{folder.name}-{number}.meeting")
    script = str(SCRIPTS / "signalled_run.py")
    return [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(ranks), str(meeting)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def wait_until_made(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line == "made\n" for line in lines)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return the exit codes and outputs of all processes."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_preempted_again_and_again_resumes_exactly(ranks: int, tmp_path: Path) -> None:
    """Each preempted run saves and exits by the signal's code; the final weights are equal.

    Of two ranks, both get the signal, or one rank alone.
    """
    assert [code for code, _ in ended(start(tmp_path / "straight", ranks, 0))] == [0] * ranks
    folder = tmp_path / "signalled"
    chance = random.Random(1)
    preempted = 0
    for attempt in range(80):
        number = chance.choice(SIGNALS)
        processes = start(folder, ranks, attempt)
        wait_until_made(processes)
        time.sleep(chance.uniform(0.0, 0.6))
        signalled = processes if chance.random() < 0.5 else [chance.choice(processes)]
        for process in signalled:
            if process.poll() is None:
                os.killpg(process.pid, number)
        found = ended(processes)
        codes = {code for code, _ in found}
        if codes == {128 + number}:
            assert read_run_state(folder).state == "preempted"
            preempted += 1
        elif ranks == 1:  # before or after the loop, signals have their default effect
            assert codes <= {0, -number}, found
        if all((folder / f"weights{rank}.pt").exists() for rank in range(ranks)):
            break
    assert preempted > 5
    for rank in range(ranks):
        one, other = (
            torch.load(path / f"weights{rank}.pt") for path in (folder, tmp_path / "straight")
        )
        assert equal(one, other)
    assert not list(folder.rglob("*.tmp"))
