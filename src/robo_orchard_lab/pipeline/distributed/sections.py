"""Calls that all processes of a job make alike, and that end together where one fails."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from robo_orchard_lab.pipeline.distributed.failure_watch import Watch
from robo_orchard_lab.pipeline.distributed.job_store import JobStore, Place
from robo_orchard_lab.pipeline.distributed.shutdown import (
    leave_group_at_exit,
    let_threads_pass_ahead_of_forks,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock

_watch: Watch | None = None


@contextmanager
def end_together(
    clock: StallClock | None = None,
    place: Callable[[int], Place] | None = None,
) -> Iterator[None]:
    """Around a call that all ranks make: an error on one of them ends it on all, within seconds.

    The first error is told to the other ranks, whose own errors, of exchanges that it has broken,
    become a :class:`RankFailed` with its text. A process whose main thread does not come out, such
    as one that waits for a device, is ended by a thread. So it is where a process is gone.

    With one process and no clock, nothing is done at all.

    Args:
        clock: when the call has stalled; the job then fails, and stacks are written on all ranks.
        place: how far the call has come, given the number of its section; asked by another thread,
            which finds ranks that do by themselves what all do together. A call with it that ends
            well waits for the other ranks' ends, for three seconds at the most.
    """
    watch = _watch_of_job(clock)
    if watch is None:
        yield
        return
    with watch.section(clock, place):
        yield


def failing(error: BaseException) -> None:
    """This rank has failed, if it is within :func:`end_together`; what follows may take long."""
    if _watch is not None:
        _watch.tell(error)


def meet_others(where: str) -> None:
    """Wait for all ranks to come here, within :func:`end_together`, without a collective.

    That is for a rank ahead of a collective that another one may not come to: where that is found
    meanwhile, or a rank fails, the job ends with it.

    Args:
        where: a name for the place; a rank comes there once in a call.

    Raises:
        PipelineStateError: what is found is this rank's.
        RuntimeError: it is another one's.
    """
    if _watch is not None:
        _watch.meet(where)


def another_failed() -> bool:
    """Whether the job is at its end since some rank has failed, this one or another."""
    return _watch is not None and _watch.failure is not None


def _watch_of_job(clock: StallClock | None) -> Watch | None:
    """The one of this process, made where there is something to watch: a collective, once."""
    global _watch
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if _watch is not None and _watch.world is not world:
        _end_watch()
    if _watch is None:
        store = None
        if world is not None and dist.get_world_size() > 1:
            leave_group_at_exit()
            let_threads_pass_ahead_of_forks()
            store = JobStore.of_job()
        if store is not None or clock is not None:
            _watch = Watch(store, world)
            atexit.unregister(_end_watch)
            atexit.register(_end_watch)  # after the group's, so that it comes ahead of it
    return _watch


def _end_watch() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None
