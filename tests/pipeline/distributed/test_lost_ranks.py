"""Processes that are gone without a word are found, and others are not taken for such."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented

from robo_orchard_lab.pipeline.distributed.failure_watch import LostRankDetector
from robo_orchard_lab.pipeline.distributed.failures import ProcessIdentity
from robo_orchard_lab.pipeline.distributed.job_store import JobStore

MANY_LOOKS = 100  # more than half a minute of them


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def looking(other: ProcessIdentity) -> LostRankDetector:
    """Rank 0's, where rank 1 never says a word."""
    store = HashStore()
    for rank in range(2):
        store.set(f"beat/{rank}", "0 0")
    return LostRankDetector(JobStore(store, 0, [ProcessIdentity.own(), other]))


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    began_at = psutil.Process(process.pid).create_time()
    return ProcessIdentity.own().model_copy(update={"pid": process.pid, "started_at": began_at})


def test_a_silent_process_of_this_machine_is_there_while_it_runs(
    child: subprocess.Popen[bytes],
) -> None:
    """One that is busy is not lost; one that is killed is, at the next look."""
    lost = looking(identity(child))
    assert all(lost.look(section=1) is None for _ in range(MANY_LOOKS))
    child.kill()
    child.wait()
    found = lost.look(section=1)
    assert found is not None
    assert (found.rank, found.type) == (1, "Killed")


def test_a_silent_process_of_another_machine_is_lost(child: subprocess.Popen[bytes]) -> None:
    """There its silence is all that tells."""
    lost = looking(identity(child).model_copy(update={"host": "elsewhere"}))
    looks = [lost.look(section=1) for _ in range(MANY_LOOKS)]
    assert looks[0] is None
    assert looks[-1] is not None


def test_setting_the_clock_loses_nobody(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which all processes then began an hour later; one that is killed is found as before."""
    lost = looking(identity(child))
    boot_at = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_at + 3600.0)
    assert lost.look(section=1) is None
    child.kill()
    child.wait()
    assert lost.look(section=1) is not None
