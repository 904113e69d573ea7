"""Processes that are gone without a word."""

from __future__ import annotations

from robo_orchard_lab.pipeline.errors import RankFailure
from robo_orchard_lab.pipeline.peers.failures import killed
from robo_orchard_lab.pipeline.peers.job_store import JobStore

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
