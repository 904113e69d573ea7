"""Failures of a job: :func:`fail_together` ends a call on all ranks if it fails on one rank.

:class:`FailureWatch` is the thread behind it, which ends this process if another rank fails, dies
or stalls.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch.distributed as dist

from robo_orchard_lab.pipeline.distributed import shutdown
from robo_orchard_lab.pipeline.distributed.failures import (
    KILLED,
    attach_root_cause,
    failure_of,
    is_broken_collective,
    is_remote_failure,
    killed_failure,
)
from robo_orchard_lab.pipeline.distributed.job_store import (
    JobStore,
    RankPosition,
    find_diverged_rank,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.errors import (
    PipelineStateError,
    RankFailed,
    RankFailure,
    RunPreempted,
)

logger = logging.getLogger(__name__)

STALLED = "Stalled"

_LOOK_S = 0.5
_SILENT_LOOKS = 60  # half a minute, for a network outage or a busy process
_WAIT_S = 3.0  # for other ranks to report or to acknowledge a failure
_GRACE_S = 3.0  # for the main thread to raise by itself after a failure of another rank
_OWN_GRACE_S = 8.0  # after a failure of this rank, while the afters of its hooks run
_LOG_S = 1.0  # to write a log record
_NO_ANSWER_S = 3.0  # without an answer from the store
_FOLLOW_S = shutdown.MAX_EXIT_S + 1.0  # for the rank that failed first to exit
_SEEN_S = 0.5  # for a launcher to notice the exit


class LostRankDetector:
    """Detects dead ranks, by process id on this machine and by missing heartbeats elsewhere.

    Each rank checks the process of the next rank on its machine, so a living rank checks every
    process. Each rank reads the heartbeats and positions of the first rank, of the next rank, and
    of the next rank on its machine: a living rank reads those of every machine that died, and the
    work of a rank does not grow with the world size.
    A process that runs on this machine is alive even without heartbeats, for example while it holds
    the interpreter lock. The detector counts checks instead of time, so processes that are
    suspended and resumed together stay alive.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        count, own = len(store.processes), store.rank
        here = [rank for rank in range(count) if store.processes[rank].is_here()]
        for rank in here:
            store.processes[rank].track()
        self._here = frozenset(here)
        self._next = here[(here.index(own) + 1) % len(here)] if own in here else own
        self.ranks = sorted({0, self._next, (own + 1) % count} - {own})
        """Ranks whose heartbeats and positions this rank reads."""
        self._awaited = [rank for rank in range(count) if rank != own] if own == 0 else self.ranks
        self._heard: dict[int, int] = {}
        self._silent_for = dict.fromkeys(self.ranks, 0)

    def look(self, section: int) -> RankFailure | None:
        """Return the failure of a rank that died within the section, or None."""
        # Before reading its heartbeat, which then was its last one.
        gone = self._next != self._store.rank and self._store.processes[self._next].is_gone()
        for rank, (beat, left) in zip(self.ranks, self._store.beats(self.ranks), strict=True):
            if beat != self._heard.get(rank):
                self._heard[rank], self._silent_for[rank] = beat, 0
            else:
                self._silent_for[rank] += 1
            silent = rank not in self._here and self._silent_for[rank] >= _SILENT_LOOKS
            if left < section and (silent or (gone and rank == self._next)):
                # It may have reported the cause in a later section.
                process = self._store.processes[rank]
                killed = killed_failure(rank, process, "ended outside of the trainer")
                return self._store.failure(left + 1) or killed
        return None

    def all_left(self, section: int, *, or_died: bool) -> bool:
        """Return True if the ranks that this rank reads left the section, or died.

        The first rank, which may host the store, reads all ranks.
        """
        beats = self._store.beats(self._awaited)
        return all(
            left >= section or (or_died and self._store.processes[rank].is_gone())
            for rank, (_, left) in zip(self._awaited, beats, strict=True)
        )


class FailureWatch:
    """Thread that checks the other ranks and the progress of the run twice a second.

    Between two sections it only writes heartbeats. ``store`` is None for one process.
    """

    def __init__(self, store: JobStore | None, world: Any) -> None:
        self.world = world
        self.failure: RankFailure | None = None
        """First failure in the open section, on any rank."""
        self._store = store
        self._lost = None if store is None else LostRankDetector(store)
        self._section = 0  # number of the current section, from 1
        self._open = False
        self._has_reported = False
        self._clock: StallClock | None = None
        self._position: Callable[[int], RankPosition] | None = None
        self._failed_for_s = 0.0
        self._no_answer_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread before the interpreter exits.

        The process that hosts the store waits for ranks that still work. After a failure of
        another rank, that rank exits first.
        """
        if self.failure is not None:
            self._wait_for_first_exit(self.failure, lambda: False)
        keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        if keeps_store and self._store is not None and self._store.rank == 0 and not self.failure:
            lost = self._lost
            assert lost is not None
            with suppress(Exception):  # the store may be closed
                self._wait_until(lambda: lost.all_left(self._section, or_died=True), 30.0)
        self._stop.set()
        self._thread.join(10.0)

    @contextmanager
    def section(
        self, clock: StallClock | None, position: Callable[[int], RankPosition] | None
    ) -> Iterator[None]:
        """Watch a call that all ranks make. A nested section has its own clock only."""
        outer = self._clock
        if clock is not None:
            clock.start()
            self._clock = clock
        if self._open:
            try:
                yield
            except BaseException as error:
                self._raise_first(error)
            finally:
                self._clock = outer
            return
        self._section += 1
        self._position = position
        self.failure, self._has_reported, self._failed_for_s, self._open = None, False, 0.0, True
        try:
            yield
        except BaseException as error:
            self._clock = None
            self._raise_first(error)
        else:
            self._clock = None
            if position is not None and (failed := self._failed_at_the_end()) is not None:
                raise RankFailed(failed)
        finally:
            self._clock, self._open = outer, False
            self._leave()

    def _leave(self) -> None:
        if self._store is not None:
            with suppress(Exception):  # the store may be closed
                self._publish_position(self._store)
                self._store.leave(self._section)

    def _failed_at_the_end(self) -> RankFailure | None:
        """Return another rank's failure after this rank is done; None after success or timeout."""
        store, lost, section = self._store, self._lost, self._section
        if store is None or lost is None:
            return None
        self._leave()
        failed: RankFailure | None = None
        with suppress(Exception):  # the store may be closed by a process that is done
            self._wait_until(
                lambda: self.failure is not None or lost.all_left(section, or_died=False), _WAIT_S
            )
            failed = self.failure or store.failure(section)
        return None if failed is None or failed.rank == store.rank else failed

    def _publish_position(self, store: JobStore) -> None:
        if self._position is not None:
            store.set_position(self._position(self._section))

    def wait_for_all(self, where: str) -> None:
        """Wait until all ranks reach this point, without a timeout, or until a rank fails."""
        store, section = self._store, self._section
        if store is None or not self._open:
            return
        store.arrive(section, where)
        pause_s = 0.002
        while not store.all_arrived(section, where):
            if self.failure is not None and self.failure.rank == store.rank:
                raise PipelineStateError(self.failure.message)
            if self.failure is not None:
                raise RuntimeError("another process of the job has failed")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)

    def report(self, error: BaseException) -> None:
        """Report an error of this rank, unless it follows from another rank's failure."""
        store = self._store
        if store is None or self._has_reported or not self._open or is_broken_collective(error):
            return
        self._has_reported = True
        self._claim(self._section, failure_of(error, store.rank))

    def _raise_first(self, error: BaseException) -> NoReturn:
        """Raise the failure of another rank that caused this error, or the error.

        Waits until the other ranks have acknowledged the failure, or for a timeout.
        """
        store = self._store
        if store is None or (isinstance(error, RunPreempted) and not self._has_reported):
            raise error  # all ranks are preempted together
        follows = not self._has_reported and is_broken_collective(error)
        if follows:
            self._wait_until(lambda: self.failure is not None, _WAIT_S)
        if not self._has_reported:
            self._has_reported = True
            self._claim(self._section, failure_of(error, store.rank))
        first = self.failure
        if first is None or first.rank == store.rank:
            with suppress(Exception):  # the store may be closed
                self._wait_until(lambda: store.all_acknowledged(self._section), _WAIT_S)
            raise error
        if follows and not is_remote_failure(error):
            raise RankFailed(first) from error
        own = failure_of(error, store.rank)
        if (own.type, own.message) != (first.type, first.message):
            attach_root_cause(error, first)
        raise error

    def _claim(self, section: int, failure: RankFailure) -> None:
        """Report a failure, and read which failure was the first."""
        assert self._store is not None
        first, is_own = failure, True
        with suppress(Exception):  # without a store, this failure is all that is known
            first, is_own = self._store.fail(section, failure)
            if first.type != STALLED:  # a stall is acknowledged after its stacks are written
                self._store.acknowledge(section)
        self._set(section, first)
        if is_own:
            _log(first)

    def _wait_until(self, is_so: Callable[[], bool], longest_s: float) -> None:
        end_at = time.monotonic() + longest_s
        while not is_so() and time.monotonic() < end_at:
            time.sleep(0.02)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self._look()
                self._no_answer_s = 0.0
            except Exception as error:  # stores raise errors of different types
                self._no_answer_s += _LOOK_S
                if self._open and self._no_answer_s >= _NO_ANSWER_S and self.failure is None:
                    self.failure = RankFailure(
                        rank=0,
                        type=KILLED,
                        message="the store of the process group is gone, as after a kill of the "
                        f"launcher or of the first rank ({type(error).__name__})",
                    )
            self._exit_if_due()

    def _look(self) -> None:
        store, section = self._store, self._section
        if store is not None:
            store.beat()
        if not self._open:
            return
        if self.failure is None and store is not None:
            assert self._lost is not None
            if (known := store.failure(section)) is not None:
                if known.type != STALLED:
                    store.acknowledge(section)
                self._set(section, known)
            elif (lost := self._lost.look(section)) is not None:
                self._claim(section, lost)
            elif self._position is not None:
                self._publish_position(store)
                diverged = find_diverged_rank(store.positions(self._lost.ranks), section)
                if diverged is not None:
                    self._claim(section, diverged)
        if self.failure is None and self._clock is not None and self._clock.look(_LOOK_S):
            rank = 0 if store is None else store.rank
            stalled = RankFailure(rank, STALLED, self._clock.reason())
            if store is None:
                self._set(section, stalled)
            else:
                self._claim(section, stalled)

    def _set(self, section: int, failure: RankFailure) -> None:
        if self._open and section == self._section:
            self.failure = failure

    def _exit_if_due(self) -> None:
        failure, store = self.failure, self._store
        if failure is None or not self._open:
            return
        rank = 0 if store is None else store.rank
        if failure.type == STALLED:
            shutdown.force_exit(failure, rank, lambda: self._write_stall(failure), _WAIT_S)
        self._failed_for_s += _LOOK_S
        if self._failed_for_s >= (_OWN_GRACE_S if failure.rank == rank else _GRACE_S):
            self._wait_for_first_exit(
                failure, lambda: not self._open or not self._has_left(failure.rank)
            )
            if self._open:
                shutdown.force_exit(failure, rank)

    def _write_stall(self, failure: RankFailure) -> None:
        """Write stacks, and wait until the other ranks have written theirs.

        A launcher may end all ranks as soon as one rank exits.
        """
        if self._clock is not None:
            self._clock.write_stacks()
        shutdown.notify_forced_exit(failure)
        if (store := self._store) is not None:
            store.acknowledge(self._section)
            self._wait_until(lambda: store.all_acknowledged(self._section), _WAIT_S)

    def _wait_for_first_exit(self, failure: RankFailure, is_pointless: Callable[[], bool]) -> None:
        """Wait for the exit of the rank that failed first, so that its launcher reports it.

        Does nothing if that rank runs on another machine.
        """
        if self._store is None or failure.rank == self._store.rank or failure.type == KILLED:
            return
        first = self._store.processes[failure.rank]
        if first.is_here():
            self._wait_until(lambda: first.is_gone() or is_pointless(), _FOLLOW_S)
            if first.is_gone():
                time.sleep(_SEEN_S)

    def _has_left(self, rank: int) -> bool:
        """Return True if a rank left the section."""
        assert self._store is not None
        with suppress(Exception):  # the store may be closed
            return self._store.beats([rank])[0][1] >= self._section
        return False


def _log(failure: RankFailure) -> None:
    """Log a failure in a thread, since a stuck thread may hold the logging lock."""
    thread = threading.Thread(target=logger.error, args=("%s", failure), daemon=True)
    thread.start()
    thread.join(_LOG_S)


_watch: FailureWatch | None = None  # of this process


@contextmanager
def fail_together(
    clock: StallClock | None = None, position: Callable[[int], RankPosition] | None = None
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
    diverges. A rank reaches the point ``where`` once in a section.

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
            shutdown.destroy_group_at_exit()
            shutdown.pause_before_forks()
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
