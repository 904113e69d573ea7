"""A signal to some ranks of a job stops all ranks at one commit point."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it

from launching import SCRIPTS, command, environment
from robo_orchard_lab.pipeline.run.run_state import read_run_state

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def launched(folder: Path, *kinds: str) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks that train once for each kind."""
    job = subprocess.Popen(
        command(SCRIPTS / "preempted_on_ranks.py", folder, *kinds),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with job:
        try:
            yield job
        finally:
            if job.poll() is None:
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                    process.kill()


def processes_at(folder: Path, kind: str, job: subprocess.Popen[str]) -> list[int]:
    """Return the processes of both ranks once both wait for the signal."""
    files = [folder / f"{kind}.rank{rank}" for rank in range(2)]
    end_at = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < end_at, kind
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


def test_a_signal_anywhere_stops_all_ranks_at_one_step(tmp_path: Path) -> None:
    """All ranks save together, exit by the signal's code in 25 s, and resume bit-identically."""
    kinds = ["one rank", "step", "save", "evaluation", "data"]
    with launched(tmp_path, *kinds, "time", "launcher") as job:
        for kind in kinds:
            ranks = processes_at(tmp_path, kind, job)
            # Workers get the signal too, as from a scheduler; in one case a single rank gets it.
            signalled = [psutil.Process(rank) for rank in ranks]
            signalled += [child for rank in signalled[:] for child in rank.children()]
            for process in signalled[1:2] if kind == "one rank" else signalled:
                process.send_signal(signal.SIGTERM)
            (tmp_path / f"{kind}.sent").touch()
        processes_at(tmp_path, "launcher", job)
        started = psutil.Process(job.pid).children(recursive=True)
        job.terminate()
        sent_at = time.monotonic()
        (tmp_path / "launcher.sent").touch()
        output = job.communicate(timeout=60)[0]
        assert time.monotonic() - sent_at < 25
        assert job.returncode == 1, output  # torchrun's own code, for any exit codes of its ranks
        assert len(started) >= 2
        assert not any(process.is_running() for process in started)
    first, second = (json.loads((tmp_path / f"found{r}.json").read_text()) for r in range(2))
    assert first == second, output
    assert list(first) == [*kinds, "time", "launcher"]
    for kind, found in first.items():
        assert found["code"] == (75 if kind == "time" else TERMINATED), kind
        assert found["checkpoints"] == ([5] if kind == "save" else []) + [found["stopped"]], kind
        assert found["resumes"], kind
        state = read_run_state(tmp_path / "states" / kind)
        assert (state.state, state.exit_code) == ("preempted", found["code"]), kind
        assert state.progress["global_step_id"] == found["stopped"], kind
        assert state.checkpoint is not None, kind
        assert state.checkpoint.step == found["stopped"], kind
        if kind != "time":
            assert found["stopped"] < 200, kind
    # Steps of a millisecond or more, and exchanges that take a hundredth of the time.
    assert 1 <= first["time"]["exchanges"] <= 10 + first["time"]["stopped"] / 3
