"""The thread that sees to it that a process ends when another one of the job has failed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from robo_orchard_lab.pipeline.distributed.failures import (
    KILLED,
    failure_of,
    is_broken_exchange,
    is_failed_elsewhere,
    killed,
    note_first,
)
from robo_orchard_lab.pipeline.distributed.job_store import JobStore, Place, stray_among
from robo_orchard_lab.pipeline.distributed.shutdown import LONGEST_EXIT_S, end_hard, tell_hard_end
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.errors import (
    PipelineStateError,
    RankFailed,
    RankFailure,
    RunPreempted,
)

# --- lost ranks ------------------------------------------------------------------------------
# Processes that are gone without a word.


_SILENT_LOOKS = 60  # half a minute, for a network that is gone for a while, or a busy process


class LostRanks:
    """Finds them by their process, on this machine, and by their silence, on others.

    Each rank looks for the process of the next one on its machine, so that each is looked for by
    some rank that lives. The first rank listens to all, the others to the first and the next. One
    that runs on this machine is there, however long it is silent, as while one of its threads keeps
    the others waiting. Looks are counted, not the time, so that a process that is suspended and
    goes on finds nobody missing who was suspended with it.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        count, own = len(store.processes), store.rank
        here = [rank for rank in range(count) if store.processes[rank].is_here()]
        for rank in here:
            store.processes[rank].keep_in_sight()
        self._here = frozenset(here)
        self._next = here[(here.index(own) + 1) % len(here)] if own in here else own
        listened = range(count) if own == 0 else {0, self._next}
        self.ranks = sorted(set(listened) - {own})
        """Those that this one listens to."""
        self._heard: dict[int, int] = {}
        self._silent_for = dict.fromkeys(self.ranks, 0)

    def look(self, section: int) -> RankFailure | None:
        """A process that is gone, and has not left the section; None where all are there."""
        # Ahead of what it has written, which then was its last word.
        gone = self._next != self._store.rank and self._store.processes[self._next].is_gone()
        for rank, (beat, left) in zip(self.ranks, self._store.beats(self.ranks), strict=True):
            if beat != self._heard.get(rank):
                self._heard[rank], self._silent_for[rank] = beat, 0
            else:
                self._silent_for[rank] += 1
            silent = rank not in self._here and self._silent_for[rank] >= _SILENT_LOOKS
            if left < section and (silent or (gone and rank == self._next)):
                # It may have told why in a section that this rank had left by then.
                return self._store.failure(left + 1) or self._as_failure(rank)
        return None

    def have_left(self, section: int) -> bool:
        """Whether those that this one listens to say that they have left the section."""
        return all(left >= section for _, left in self._store.beats(self.ranks))

    def all_left(self, section: int) -> bool:
        """Whether all others have left the section, or are known to be gone."""
        beats = self._store.beats(self.ranks)
        return all(
            left >= section or self._store.processes[rank].is_gone()
            for rank, (_, left) in zip(self.ranks, beats, strict=True)
        )

    def _as_failure(self, rank: int) -> RankFailure:
        return killed(rank, self._store.processes[rank], "ended outside of the trainer")


logger = logging.getLogger(__name__)

STALLED = "Stalled"

_LOOK_S = 0.5
_WAIT_S = 3.0  # for other processes to tell, or to know, what has failed
_GRACE_S = 3.0  # for the main thread to come out by itself when another process has failed
_OWN_GRACE_S = 8.0  # when this one has: its hooks' afters run
_LOG_S = 1.0  # to come into the log
_DEAF_S = 3.0  # without an answer of the store
_FOLLOW_S = LONGEST_EXIT_S + 1.0  # for the one that failed first to end
_SEEN_S = 0.5  # for a launcher to see that it has ended


class Watch:
    """Looks twice a second at what the other processes tell, and at the run's progress.

    Between two calls of the trainer nothing is done but to tell that this process lives.

    Args:
        store: of the job; None where there is one process.
        world: the process group that it belongs to.
    """

    def __init__(self, store: JobStore | None, world: Any) -> None:
        self.world = world
        self.failure: RankFailure | None = None
        """What has failed in the section that is open, on whichever rank."""
        self._store = store
        self._lost = None if store is None else LostRanks(store)
        self._section = 0  # how many there were
        self._open = False
        self._told = False
        self._clock: StallClock | None = None
        self._place: Callable[[int], Place] | None = None
        self._failed_for_s = 0.0
        self._deaf_for_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, ahead of the interpreter, in which it could not go on.

        Where this process keeps the store, it waits for those that are still at work. Where it
        follows of another one's failure, that one ends first.
        """
        if self.failure is not None:
            self._let_first_end(self.failure, lambda: False)
        keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        if keeps_store and self._store is not None and self._store.rank == 0 and not self.failure:
            lost = self._lost
            assert lost is not None
            with suppress(Exception):  # a store that is gone needs no keeper
                self._wait_until(lambda: lost.all_left(self._section), 30.0)
        self._stop.set()
        self._thread.join(10.0)

    @contextmanager
    def section(
        self, clock: StallClock | None, place: Callable[[int], Place] | None
    ) -> Iterator[None]:
        """A call that all ranks make alike. Within another one, only the clock is its own."""
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
        self._place = place
        self.failure, self._told, self._failed_for_s, self._open = None, False, 0.0, True
        try:
            yield
        except BaseException as error:
            self._clock = None
            self._raise_first(error)
        else:
            self._clock = None
            if place is not None and (failed := self._failed_at_the_end()) is not None:
                raise RankFailed(failed)
        finally:
            self._clock, self._open = outer, False
            self._leave()

    def _leave(self) -> None:
        if self._store is not None:
            with suppress(Exception):  # the store may be gone
                self._tell_place(self._store)
                self._store.leave(self._section)

    def _failed_at_the_end(self) -> RankFailure | None:
        """Another rank's failure, where this one is done; None when all are, or one takes long."""
        store, lost, section = self._store, self._lost, self._section
        if store is None or lost is None:
            return None
        self._leave()
        told: RankFailure | None = None
        with suppress(Exception):  # the store may be gone, with a process that is done
            self._wait_until(lambda: self.failure is not None or lost.have_left(section), _WAIT_S)
            told = self.failure or store.failure(section)
        return None if told is None or told.rank == store.rank else told

    def _tell_place(self, store: JobStore) -> None:
        if self._place is not None:
            store.tell_place(self._place(self._section))

    def meet(self, where: str) -> None:
        """Wait until all ranks have come here, however long, or until one has failed."""
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

    def tell(self, error: BaseException) -> None:
        """This process has failed, unless that follows of another one's failure."""
        store = self._store
        if store is None or self._told or not self._open or is_broken_exchange(error):
            return
        self._told = True
        self._claim(self._section, failure_of(error, store.rank))

    def _raise_first(self, error: BaseException) -> NoReturn:
        if (first := self._first_of(error)) is not None:
            raise RankFailed(first) from error
        raise error

    def _first_of(self, error: BaseException) -> RankFailure | None:
        """The failure of another rank that this error follows of; None where it does not.

        Returns when the others know, or have had time for it.
        """
        store = self._store
        if store is None or (isinstance(error, RunPreempted) and not self._told):
            return None  # preempted at the end of a run, as all ranks are
        follows = not self._told and is_broken_exchange(error)
        if follows:
            self._wait_until(lambda: self.failure is not None, _WAIT_S)
        if not self._told:
            self._told = True
            self._claim(self._section, failure_of(error, store.rank))
        first = self.failure
        if first is None or first.rank == store.rank:
            with suppress(Exception):  # the store may be gone
                self._wait_until(lambda: store.all_know(self._section), _WAIT_S)
            return None
        if follows and not is_failed_elsewhere(error):
            return first
        own = failure_of(error, store.rank)
        if (own.type, own.message) != (first.type, first.message):
            note_first(error, first)
        return None

    def _claim(self, section: int, failure: RankFailure) -> None:
        """Tell a failure, and learn which one was the first."""
        assert self._store is not None
        first, is_own = failure, True
        with suppress(Exception):  # without a store, it is all that this process knows
            first, is_own = self._store.fail(section, failure)
            if first.type != STALLED:  # whose stacks come first
                self._store.acknowledge(section)
        self._set(section, first)
        if is_own:
            _log(first)

    def _wait_until(self, is_so: Callable[[], bool], longest_s: float) -> None:
        end_at = time.monotonic() + longest_s
        while not is_so() and time.monotonic() < end_at:
            time.sleep(0.02)

    def _look_on(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self._look()
                self._deaf_for_s = 0.0
            except Exception as error:  # of the store, in as many kinds as there are stores
                self._deaf_for_s += _LOOK_S
                if self._open and self._deaf_for_s >= _DEAF_S and self.failure is None:
                    self.failure = _store_gone(error)
            self._end_if_due()

    def _look(self) -> None:
        store, section = self._store, self._section
        if store is not None:
            store.beat()
        if not self._open:
            return
        if self.failure is None and store is not None:
            assert self._lost is not None
            if (told := store.failure(section)) is not None:
                if told.type != STALLED:
                    store.acknowledge(section)
                self._set(section, told)
            elif (lost := self._lost.look(section)) is not None:
                self._claim(section, lost)
            elif self._place is not None:
                self._tell_place(store)
                if (stray := stray_among(store.places(self._lost.ranks), section)) is not None:
                    self._claim(section, stray)
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

    def _end_if_due(self) -> None:
        failure, store = self.failure, self._store
        if failure is None or not self._open:
            return
        rank = 0 if store is None else store.rank
        if failure.type == STALLED:
            end_hard(failure, rank, lambda: self._write_stall(failure), _WAIT_S)
        self._failed_for_s += _LOOK_S
        if self._failed_for_s >= (_OWN_GRACE_S if failure.rank == rank else _GRACE_S):
            self._let_first_end(failure, lambda: not self._open or not self._has_left(failure.rank))
            if self._open:
                end_hard(failure, rank)

    def _write_stall(self, failure: RankFailure) -> None:
        """Write all that this process has to, and wait until the others have, too.

        A launcher may end them as soon as one has ended.
        """
        if self._clock is not None:
            self._clock.write_stacks()
        tell_hard_end(failure)
        if (store := self._store) is not None:
            store.acknowledge(self._section)
            self._wait_until(lambda: store.all_know(self._section), _WAIT_S)

    def _let_first_end(self, failure: RankFailure, is_vain: Callable[[], bool]) -> None:
        """Ahead of this process, so that a launcher finds which one has failed first.

        Not where it runs on another machine, with a launcher of its own.
        """
        if self._store is None or failure.rank == self._store.rank or failure.type == KILLED:
            return
        first = self._store.processes[failure.rank]
        if first.is_here():
            self._wait_until(lambda: first.is_gone() or is_vain(), _FOLLOW_S)
            if first.is_gone():
                time.sleep(_SEEN_S)

    def _has_left(self, rank: int) -> bool:
        """Whether a process is done with the section, so that it waits for none of the others."""
        assert self._store is not None
        with suppress(Exception):  # the store may be gone
            return self._store.beats([rank])[0][1] >= self._section
        return False


def _log(failure: RankFailure) -> None:
    """Have it in the log, where no stuck thread keeps that, such as one that writes to a disk."""
    thread = threading.Thread(target=logger.error, args=("%s", failure), daemon=True)
    thread.start()
    thread.join(_LOG_S)


def _store_gone(error: Exception) -> RankFailure:
    return RankFailure(
        rank=0,
        type=KILLED,
        message="the store by which the processes of the job meet is gone, as when the launcher "
        f"or the first rank is killed ({type(error).__name__})",
    )
