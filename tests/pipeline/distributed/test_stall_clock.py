"""Stall detection and stack files; complete runs are in ``test_failed_ranks.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launching import environment
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock, record_heartbeat
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.progress import TrainerProgress


def test_progress_resets_the_stall_clock() -> None:
    """A step or a heartbeat restarts the stall clock."""
    progress = TrainerProgress()
    clock = StallClock(2.0, progress)
    clock.start()
    assert not clock.look(1.5)
    progress.finish_step()
    assert not clock.look(1.5)
    assert not clock.look(1.5)
    record_heartbeat()
    assert not clock.look(1.5)
    assert not clock.look(1.5)
    assert clock.look(0.5)
    clock.start()
    assert not clock.look(1.5)


def test_stacks_are_written_to_the_folder_of_the_run(tmp_path: Path) -> None:
    """The file has every thread's stack, the rank and the position in the run."""
    clock = StallClock(2.0, TrainerProgress(), tmp_path, rank=3)
    clock.write_stacks()
    text = (tmp_path / "stalled" / "rank00003.txt").read_text()
    assert text.startswith("rank 3, process ")
    assert "test_stacks_are_written_to_the_folder_of_the_run" in text
    assert clock.reason().startswith("no progress for 2 s at step 0")
    assert str(tmp_path / "stalled") in clock.reason()


def test_stacks_without_a_folder_go_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a usable run folder, stacks go to standard error."""
    (tmp_path / "stalled").write_text("a file is in the way")
    for folder in (None, tmp_path):
        StallClock(2.0, TrainerProgress(), folder).write_stacks()
        assert "test_stacks_without_a_folder_go_to_stderr" in capfd.readouterr().err
    assert "standard error" in StallClock(2.0, TrainerProgress()).reason()


@pytest.mark.parametrize("timeout_s", [0, -1.0, "1 min"])
def test_only_a_positive_timeout_is_accepted(timeout_s: object) -> None:
    """A timeout is a number of seconds above zero."""
    with pytest.raises(PipelineConfigError, match="stall_timeout_s must be > 0 seconds"):
        StallClock(timeout_s, TrainerProgress())  # type: ignore[arg-type]  # that is the point


ON_A_DISK_THAT_HANGS = """
import logging, sys, time
from torch.distributed import HashStore
from robo_orchard_lab.pipeline.distributed import failure_watch, shutdown
from robo_orchard_lab.pipeline.distributed.job_store import JobStore
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run import run_state

class Saves(logging.Handler):
    def emit(self, record):
        state.saved("step_1", 1)

shutdown._STUCK_S = failure_watch._WAIT_S = failure_watch._LOG_S = 0.5  # of 5, 3 and 1
progress, store = TrainerProgress(), HashStore()
state = run_state.RunStateFile(sys.argv[1], progress)
for rank in range(2):
    store.set(f"beat/{rank}", "0 0")
job = failure_watch.FailureWatch(JobStore(store, 0, [ProcessIdentity.own()] * 2), None)
with state.around_run(Requests()), job.section(StallClock(1.0, progress), None):
    run_state.replace_file = lambda *to_write: time.sleep(60)
    logging.getLogger().addHandler(Saves())
    logging.error("which takes the lock of the log, and of the state's file, and keeps them")
"""


def test_a_run_blocked_by_a_disk_is_ended(tmp_path: Path) -> None:
    """A stalled run ends even if the blocked thread holds the locks of log and state file."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_DISK_THAT_HANGS, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rank 0: exiting: the run has stalled, detected by rank 0: no ")
    assert "Timeout (0:00:01)!" in done.stderr  # from the guard of the exit
    assert "in saved" in done.stderr.partition("Timeout")[2]
