"""Job store: heartbeats, positions and failures of ranks, in the process group's store."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import PipelineStateError, RankFailure

_TIMEOUT_S = 5.0  # of one store request; none waits for another rank


class RankPosition(NamedTuple):
    """Position of a rank within a section."""

    section: int = 0
    """Number of the section."""
    steps: int = 0
    """Steps that are done or open."""
    commits: int = 0
    """Commit points with requests that all ranks execute together."""
    at_step: int = 0
    """Steps done at the last such commit point."""
    asked: str = ""
    """Requests at the last such commit point, with their hooks."""
    weighted: bool | None = None
    """True if losses have weights; None before the first loss."""


def find_diverged_rank(positions: Mapping[int, RankPosition], section: int) -> RankFailure | None:
    """Return the failure of a rank that entered a collective another rank skipped, or None."""
    here = {rank: place for rank, place in positions.items() if place.section == section}
    weighs = {place.weighted: rank for rank, place in here.items()}
    if True in weighs and False in weighs:
        return RankFailure(
            weighs[True],
            "PipelineStateError",
            "its batch processor returns a loss with a weight, and that of rank "
            f"{weighs[False]} without; return (outputs, loss, weight) on every rank, or on none",
        )
    ahead = max(here, key=lambda rank: here[rank].commits, default=None)
    if ahead is None:
        return None
    place = here[ahead]
    for rank, other in here.items():
        if other.commits < place.commits and other.steps > place.at_step:
            return RankFailure(
                ahead,
                "PipelineStateError",
                f"after step {place.at_step} it had a request that all ranks execute together, "
                f"and rank {rank} continued to step {other.steps} without: {place.asked}. "
                "Make the request on every rank, or with rank_local=True",
            )
    return None


class JobStore:
    """Connection of a rank to the job's heartbeats, positions and failures.

    All store requests are short and wait for no other rank; any thread may make them. Failures
    belong to a *section*: a call that all ranks make, by its number.
    """

    def __init__(self, store: Any, rank: int, processes: list[ProcessIdentity]) -> None:
        self.rank = rank
        self.processes = processes
        self._store = store
        self._lock = threading.Lock()
        self._beats = 0
        self._last_left = 0
        self._acknowledged = 0
        self._position = RankPosition()

    @classmethod
    def of_job(cls) -> JobStore:
        """Create the store of this job; a collective."""
        rank, count = dist.get_rank(), dist.get_world_size()
        store_of_job: Any = getattr(dist.group.WORLD, "get_group_store", None)
        if store_of_job is None:  # torch 2.8
            store_of_job = getattr(dist.distributed_c10d, "_get_default_store", None)
        if store_of_job is None:
            raise PipelineStateError(
                "several processes need the store of the process group, by its get_group_store(); "
                f"torch {torch.__version__} has no such method: install torch 2.8 to 2.15"
            )
        # A separate connection, since a wait for a key blocks other requests.
        store = store_of_job().clone()
        store.set_timeout(timedelta(seconds=_TIMEOUT_S))
        # The store may still hold the keys of an earlier start of the job.
        prefix = uuid.uuid4().hex
        if rank == 0:
            # In one request: two for each of 4,096 ranks cost a second.
            keys = [f"{kind}/{other}" for kind in ("beat", "position") for other in range(count)]
            values = ["0 0"] * count + [json.dumps(RankPosition())] * count
            own: Any = PrefixStore(prefix, store)  # the stubs lack multi_set
            own.multi_set(keys, values)
        gathered = gather_objects((prefix, ProcessIdentity.own().model_dump()))
        processes = [ProcessIdentity(**process) for _, process in gathered]
        return cls(PrefixStore(gathered[0][0], store), rank, processes)

    def beat(self) -> None:
        """Write a heartbeat of this rank."""
        with self._lock:
            self._beats += 1
            self._store.set(f"beat/{self.rank}", f"{self._beats} {self._last_left}")

    def leave(self, section: int) -> None:
        """Record that this rank left a section and all before it."""
        self._last_left = section
        self.beat()
        self.acknowledge(section)

    def beats(self, ranks: list[int]) -> list[tuple[int, int]]:
        """Return heartbeat counter and last section left, for each of the ranks."""
        with self._lock:
            beats = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return [tuple(map(int, beat.split())) for beat in beats]  # type: ignore[misc]

    def set_position(self, place: RankPosition) -> None:
        """Publish the position of this rank."""
        with self._lock:
            if place != self._position:
                self._store.set(f"position/{self.rank}", json.dumps(place))
                self._position = place

    def positions(self, ranks: list[int]) -> dict[int, RankPosition]:
        """Return the positions of the given ranks and of this rank."""
        with self._lock:
            texts = self._store.multi_get([f"position/{rank}" for rank in ranks])
        others = {
            rank: RankPosition(*json.loads(text)) for rank, text in zip(ranks, texts, strict=True)
        }
        return {**others, self.rank: self._position}

    def fail(self, section: int, failure: RankFailure) -> tuple[RankFailure, bool]:
        """Report a failure; return the first failure of the section, and True if it is this."""
        text = json.dumps({"by": self.rank, **asdict(failure)})
        with self._lock:
            first = self._store.compare_set(f"failed/{section}", "", text)
        return _read(first), first.decode() == text

    def failure(self, section: int) -> RankFailure | None:
        """Return the first failure of a section, or None."""
        key = f"failed/{section}"
        with self._lock:
            return _read(self._store.get(key)) if self._store.check([key]) else None

    def acknowledge(self, section: int) -> None:
        """Record that this rank knows the failure of a section; may be repeated."""
        with self._lock:
            if self._acknowledged != section:
                self._acknowledged = section
                self._store.add(f"known/{section}", 1)

    def arrive(self, section: int, where: str) -> None:
        """Record that this rank reached a meeting point; call once."""
        with self._lock:
            self._store.add(f"met/{section}/{where}", 1)

    def all_arrived(self, section: int, where: str) -> bool:
        """Return True if all ranks reached a meeting point."""
        with self._lock:
            return bool(self._store.add(f"met/{section}/{where}", 0) >= len(self.processes))

    def all_acknowledged(self, section: int) -> bool:
        """Return True if all ranks know the failure of a section or have left the section."""
        with self._lock:
            return bool(self._store.add(f"known/{section}", 0) >= len(self.processes))


def _read(text: bytes) -> RankFailure:
    fields = json.loads(text)
    del fields["by"]
    return RankFailure(**fields)
