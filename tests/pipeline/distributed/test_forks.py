"""Forks wait until other threads are outside the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launching import environment

SCRIPT = """
import os, sys, threading
from robo_orchard_lab.pipeline.distributed.shutdown import (
    destroy_group_at_exit,
    pause_before_forks,
)

destroy_group_at_exit()  # as at the start of a job
if sys.argv[1] == "waits":
    pause_before_forks()
sys.setswitchinterval(10)  # this thread keeps the interpreter until it waits for something
go, passed = threading.Event(), []
thread = threading.Thread(target=lambda: (go.wait(), passed.append(True)))
thread.start()
go.set()
child = os.fork()
if child == 0:
    os._exit(len(passed))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="forks of newer ones are safe")
@pytest.mark.parametrize(("how", "passed"), [("waits", "1"), ("does not", "0")])
def test_a_waiting_thread_runs_before_a_fork(how: str, passed: str) -> None:
    """A woken thread runs before the fork with the pause, and not without."""
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [passed]
