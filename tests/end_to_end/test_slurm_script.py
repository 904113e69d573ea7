"""The SLURM script requeues a job until its training is completed, and only then."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch

from launching import environment, has_ended
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.pipeline.run.run_state import read_run_state

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
TRAINING = ROOT / "tests" / "scripts" / "fails_on_ranks.py"


class Job:
    """A job of two nodes with one process each, simulated on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requeued = folder / "requeued"
        self.number = random.randrange(10_000)
        folder.mkdir()
        self.requeued.touch()

    def start(self, place: str, options: str, starts: int = 0) -> subprocess.Popen[str]:
        """Start the job for the first time, or as restarted by the queue."""
        return self.start_of(TRAINING, self.folder / "run", place, options, starts=starts)

    def start_of(self, *training: str | Path, starts: int = 0) -> subprocess.Popen[str]:
        """Start any training in this run folder."""
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, (self.folder / "run", *training))],
            env={
                **environment(),
                "PATH": f"{HERE / 'slurm_stand_in'}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": sys.executable,
                "PROCESSES_PER_NODE": "1",
                "MAX_RESTARTS": "0",
                "MAX_REQUEUES": "2",
                "SLURM_JOB_ID": str(self.number),
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_RESTART_COUNT": str(starts),
                "REQUEUED": str(self.requeued),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def preempt(self, starts: int = 0, number: int = signal.SIGUSR1) -> tuple[int, str]:
        """Start the job and signal the script during the training."""
        return self.interrupt(self.start("nowhere", "preemption,slowly", starts), number)

    def interrupt(
        self, script: subprocess.Popen[str], number: int = signal.SIGUSR1
    ) -> tuple[int, str]:
        """Send the script a signal during the training."""
        state = self.folder / "run" / "run_state.json"
        before = state.stat().st_mtime_ns if state.exists() else 0
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert script.poll() is None, script.communicate()[0]
            time.sleep(0.01)
        time.sleep(0.3)
        script.send_signal(number)
        return self.end(script)

    def end(self, script: subprocess.Popen[str]) -> tuple[int, str]:
        """Return the script's exit code and output."""
        started = psutil.Process(script.pid).children(recursive=True)
        output = script.communicate(timeout=120)[0]
        assert all(has_ended(process) for process in started), output
        return script.returncode, output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "run" / "end.pt", weights_only=True)
    return found


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torchrun of torch 2.8 ends at SIGUSR1"
)
def test_a_job_is_requeued_until_it_is_completed(tmp_path: Path) -> None:
    """The job ends with the weights of an uninterrupted job."""
    job = Job(tmp_path / "preempted")
    code, output = job.preempt()
    assert (code, job.requeued.read_text()) == (0, f"{job.number}\n"), output
    state = read_run_state(job.folder / "run")
    assert (state.state, state.exit_code) == ("preempted", 128 + signal.SIGUSR1)
    assert 0 < state.progress["global_step_id"] < 8
    code, output = job.end(job.start("nowhere", "preemption,slowly", starts=1))
    assert (code, job.requeued.read_text()) == (0, f"{job.number}\n"), output
    assert "start 1: the run is completed" in output
    uninterrupted = Job(tmp_path / "straight")
    code, output = uninterrupted.end(uninterrupted.start("nowhere", "preemption"))
    assert (code, uninterrupted.requeued.read_text()) == (0, ""), output
    expected, found = weights(uninterrupted.folder), weights(job.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_job_trains_a_file_until_it_is_completed(tmp_path: Path) -> None:
    """An experiment file is preempted, requeued and resumed as a script is."""
    job = Job(tmp_path / "job")
    assert main(["config", "init", str(tmp_path / "spirals.yaml")]) == 0
    training: list[str | Path] = [
        *("-m", "robo_orchard_lab", "train", tmp_path / "spirals.yaml"),
        *("--run_folder", job.folder / "run", "--trainer.max_epoch", "60"),
    ]
    code, output = job.interrupt(job.start_of(*training))
    assert (code, job.requeued.read_text()) == (0, f"{job.number}\n"), output
    done = read_run_state(job.folder / "run").progress["global_step_id"]
    code, output = job.end(job.start_of(*training, starts=1))
    assert (code, job.requeued.read_text()) == (0, f"{job.number}\n"), output
    state = read_run_state(job.folder / "run")
    assert 0 < done < state.progress["global_step_id"] == 60 * 15  # of 30 batches, half each
    assert state.state == "completed"


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued(tmp_path: Path) -> None:
    """A failed job is not requeued, also if it fails before the training of a restart."""
    job = Job(tmp_path / "failed")
    code, output = job.end(job.start("step", "preemption"))
    assert (code != 0, job.requeued.read_text()) == (True, ""), output
    assert "the run is failed" in output
    other = Job(tmp_path / "other")
    assert other.preempt()[0] == 0
    other.requeued.write_text("")
    code, output = other.end(other.start("constructor", "preemption", starts=1))
    assert (code != 0, other.requeued.read_text()) == (True, ""), output
    assert "the run is unknown" in output


@pytest.mark.slow
def test_a_job_is_not_requeued_forever(tmp_path: Path) -> None:
    """A job is not requeued after MAX_REQUEUES starts, nor after a cancellation."""
    job = Job(tmp_path / "often")
    code, output = job.preempt(starts=2)
    assert (code, job.requeued.read_text()) == (1, ""), output
    job = Job(tmp_path / "cancelled")
    code, output = job.preempt(number=signal.SIGTERM)
    assert (code, job.requeued.read_text()) == (0, ""), output
    assert "the job was cancelled" in output
