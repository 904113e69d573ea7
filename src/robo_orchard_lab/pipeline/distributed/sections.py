"""Sections: calls that all ranks make, and that fail together if one rank fails."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from robo_orchard_lab.pipeline.distributed.failure_watch import FailureWatch
from robo_orchard_lab.pipeline.distributed.job_store import JobStore, RankPosition
from robo_orchard_lab.pipeline.distributed.shutdown import (
    destroy_group_at_exit,
    pause_before_forks,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock

_watch: FailureWatch | None = None  # of this process


@contextmanager
def fail_together(
    clock: StallClock | None = None,
    position: Callable[[int], RankPosition] | None = None,
) -> Iterator[None]:
    """End a call on all ranks within seconds if it fails on one rank.

    The first error is reported to the other ranks. Their own errors from broken collectives become
    a :class:`RankFailed` with its text. A thread ends a process whose main thread is stuck, such
    as in a wait for the device. A process that dies is an error, too.

    Does nothing in a job of one process without a clock.

    Args:
        clock: detects a stall; the job then fails, and all ranks write their stacks.
        position: returns the position of this rank, given the number of the section. A thread
            calls it to detect ranks that diverged. A successful section with positions waits up
            to three seconds for the other ranks.
    """
    watch = _watch_of_job(clock)
    if watch is None:
        yield
        return
    with watch.section(clock, position):
        yield


def report_failure(error: BaseException) -> None:
    """Report this rank's error to the other ranks, within :func:`fail_together`."""
    if _watch is not None:
        _watch.report(error)


def wait_for_all_ranks(where: str) -> None:
    """Wait for all ranks without a collective, within :func:`fail_together`.

    Call it before a collective that another rank may not reach: the wait ends if a rank fails or
    diverges.

    Args:
        where: name of this point; a rank reaches the point once in a section.

    Raises:
        PipelineStateError: this rank diverged.
        RuntimeError: another rank failed.
    """
    if _watch is not None:
        _watch.wait_for_all(where)


def has_any_rank_failed() -> bool:
    """Return True if the section has failed on this or another rank."""
    return _watch is not None and _watch.failure is not None


def _watch_of_job(clock: StallClock | None) -> FailureWatch | None:
    """Return the watch of this process, created on demand; a collective, once."""
    global _watch
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if _watch is not None and _watch.world is not world:
        _end_watch()
    if _watch is None:
        store = None
        if world is not None and dist.get_world_size() > 1:
            destroy_group_at_exit()
            pause_before_forks()
            store = JobStore.of_job()
        if store is not None or clock is not None:
            _watch = FailureWatch(store, world)
            atexit.unregister(_end_watch)
            atexit.register(_end_watch)  # registered after the group's handler, so it runs first
    return _watch


def _end_watch() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None
