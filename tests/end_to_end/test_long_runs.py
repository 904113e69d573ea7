"""Memory and step time of long runs with all hooks stay constant."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks.endurance import Endured, endure
from benchmarks.every_hook import trainer_with_every_hook

from robo_orchard_lab.pipeline import hooks

ROOT = Path(__file__).resolve().parents[2]


def endure_in_a_process(steps: int) -> Endured:
    """Run in a new process, whose memory is free of other tests' leftovers."""
    done = subprocess.run(
        [sys.executable, "-m", "test_long_runs", str(steps)],
        cwd=ROOT,
        env={
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Endured(**json.loads(done.stdout.splitlines()[-1]))


def check_flat(steps: int) -> None:
    endured = endure_in_a_process(steps)
    assert endured.growth <= 1.01
    if endured.slowdown > 1.25:  # other processes may be busier at the end
        endured = endure_in_a_process(steps)
    assert endured.slowdown <= 1.25


def test_every_built_in_hook_is_used(tmp_path: Path) -> None:
    """The training of these tests has every built-in hook."""
    trainer = trainer_with_every_hook(tmp_path, 2, lambda step: None)
    on = {type(hook).__name__ for hook in trainer.hooks.all_hooks()}
    built_in = {name for name in hooks.__all__ if f"{name}Config" in hooks.__all__}
    assert built_in <= on


def test_ten_thousand_steps_are_flat() -> None:
    """Memory grows by at most 1 % from step 1,000 to 10,000, and the step time stays."""
    check_flat(10_000)


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_flat() -> None:
    """Memory grows by at most 1 % from step 1,000 to 100,000, and the step time stays."""
    check_flat(100_000)


if __name__ == "__main__":
    print(json.dumps(asdict(endure(int(sys.argv[1])))))
