"""Signals to all processes of a run at random instants, until it is completed."""

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

from robo_orchard_lab.pipeline.run_state import read_run_state
from signalled_run import make
from tiny import equal, weights

HERE = Path(__file__).parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.slow
def test_a_run_that_is_preempted_again_and_again_is_the_straight_one(tmp_path: Path) -> None:
    """Each time it is saved and ends by the signal's code; in the end the weights are the same."""
    straight = make(tmp_path / "straight")
    straight()
    folder = tmp_path / "signalled"
    chance = random.Random(1)
    preempted = 0
    for _ in range(80):
        number = chance.choice(SIGNALS)
        child = subprocess.Popen(
            [sys.executable, str(HERE / "signalled_run.py"), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == "made\n"
            time.sleep(chance.uniform(0.0, 0.6))
            os.killpg(child.pid, number)
            told = child.communicate(timeout=60)[0]
        if child.returncode == 128 + number:
            assert read_run_state(folder).state == "preempted"
            preempted += 1
        else:  # before the loop, or after it, where a signal does what it always does
            assert child.returncode in (0, -number), told
        if (folder / "weights.pt").exists():
            break
    assert preempted > 5
    assert equal(torch.load(folder / "weights.pt"), weights(straight.model))
    assert not list(folder.rglob("*.tmp"))
