"""Detection of ranks that vanished without a message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.distributed.failure_watch import LostRankDetector
from robo_orchard_lab.pipeline.distributed.job_store import JobStore

MANY_LOOKS = 100  # more than half a minute of them


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def detector(other: ProcessIdentity) -> LostRankDetector:
    """Return rank 0's detector for a silent rank 1."""
    store = HashStore()
    for rank in range(2):
        store.set(f"beat/{rank}", "0 0")
    return LostRankDetector(JobStore(store, 0, [ProcessIdentity.own(), other]))


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    began_at = psutil.Process(process.pid).create_time()
    return ProcessIdentity.own().model_copy(update={"pid": process.pid, "started_at": began_at})


def test_a_silent_local_process_is_lost_only_when_dead(
    child: subprocess.Popen[bytes],
) -> None:
    """A busy process on this machine is not lost; a killed process is, at the next check."""
    lost = detector(identity(child))
    assert all(lost.look(section=1) is None for _ in range(MANY_LOOKS))
    child.kill()
    child.wait()
    found = lost.look(section=1)
    assert found is not None
    assert (found.rank, found.type) == (1, "Killed")


def test_a_silent_remote_process_is_lost(child: subprocess.Popen[bytes]) -> None:
    """A process of another machine is lost after a period of silence."""
    lost = detector(identity(child).model_copy(update={"host": "elsewhere"}))
    looks = [lost.look(section=1) for _ in range(MANY_LOOKS)]
    assert looks[0] is None
    assert looks[-1] is not None


def test_setting_the_clock_loses_no_rank(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the system clock jumps an hour, living ranks stay and killed ranks are detected."""
    lost = detector(identity(child))
    boot_at = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_at + 3600.0)
    assert lost.look(section=1) is None
    child.kill()
    child.wait()
    assert lost.look(section=1) is not None


@pytest.mark.parametrize("dead_machine", [0, 1, 3])
def test_the_ranks_of_a_dead_machine_are_lost(dead_machine: int) -> None:
    """Each rank reads at most three others, and a living rank notices the death of any machine."""
    store, count = HashStore(), 16
    for rank in range(count):
        store.set(f"beat/{rank}", "0 0")
    own = ProcessIdentity.own()
    machines = [own.model_copy(update={"host": f"machine-{rank // 4}"}) for rank in range(count)]
    stores = [JobStore(store, rank, machines) for rank in range(count)]
    detectors = [LostRankDetector(each) for each in stores]
    assert max(len(each.ranks) for each in detectors) <= 3
    living = [rank for rank in range(count) if rank // 4 != dead_machine]
    lost = set()
    for _ in range(MANY_LOOKS):
        for rank in living:
            stores[rank].beat()
        for rank in living:
            if (failure := detectors[rank].look(section=1)) is not None:
                lost.add(failure.rank // 4)
    assert lost == {dead_machine}
