"""What the processes of a job tell one another beside their collectives."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented

from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.distributed.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.errors import RankFailure

# --- strays ----------------------------------------------------------------------------------
# Ranks that do by themselves what all of them have to do together.


class Place(NamedTuple):
    """How far a rank has come in a section."""

    section: int = 0
    """Which one, by its number."""
    steps: int = 0
    """How many are done or open."""
    commits: int = 0
    """How many commit points had something for all ranks to do together."""
    at_step: int = 0
    """How many steps were done at the last of them."""
    asked: str = ""
    """What it had to do, and who asked."""
    weighted: bool | None = None
    """Whether its losses come with weights; None where it has had none yet."""


def stray_among(places: Mapping[int, Place], section: int) -> RankFailure | None:
    """The rank that has begun what another one has passed by; None where they go together."""
    here = {rank: place for rank, place in places.items() if place.section == section}
    weighs = {place.weighted: rank for rank, place in here.items()}
    if True in weighs and False in weighs:
        return RankFailure(
            weighs[True],
            "PipelineStateError",
            "its batch processor returns a weight with the loss, and that of rank "
            f"{weighs[False]} none; return (outputs, loss, weight) on every rank, or on none",
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
                f"after step {place.at_step} it was asked for something that all ranks do "
                f"together, and rank {rank} went on to step {other.steps} without: {place.asked}. "
                "A hook has to ask on every rank, or with rank_local=True",
            )
    return None


_TIMEOUT_S = 5.0  # of one request; the answer is there already, or nobody will give it


class JobStore:
    """Signs of life and failures, in the store by which the processes have met.

    Only short requests are made, which wait for no other process; any thread may make them.

    What is failed, or left, is a *section*: a call that all ranks make alike, by its number.
    """

    def __init__(self, store: Any, rank: int, processes: list[ProcessIdentity]) -> None:
        self.rank = rank
        self.processes = processes
        self._store = store
        self._one_at_a_time = threading.Lock()
        self._beats = 0
        self._left = 0
        self._acknowledged = 0
        self._place = Place()

    @classmethod
    def of_job(cls) -> JobStore:
        """That of this job: a collective."""
        rank, count = dist.get_rank(), dist.get_world_size()
        # A connection of its own, since one that waits for a key keeps other requests waiting.
        store = _store_of_job().clone()
        store.set_timeout(timedelta(seconds=_TIMEOUT_S))
        # The store may still have what an earlier start of the job has written.
        prefix = uuid.uuid4().hex
        if rank == 0:
            for other in range(count):
                PrefixStore(prefix, store).set(f"beat/{other}", "0 0")
                PrefixStore(prefix, store).set(f"place/{other}", json.dumps(Place()))
        told = gather_objects((prefix, ProcessIdentity.own().model_dump()))
        processes = [ProcessIdentity(**process) for _, process in told]
        return cls(PrefixStore(told[0][0], store), rank, processes)

    def beat(self) -> None:
        """This process lives."""
        with self._one_at_a_time:
            self._beats += 1
            self._store.set(f"beat/{self.rank}", f"{self._beats} {self._left}")

    def leave(self, section: int) -> None:
        """This process is no longer in that section, nor in one ahead of it."""
        self._left = section
        self.beat()
        self.acknowledge(section)

    def beats(self, ranks: list[int]) -> list[tuple[int, int]]:
        """Of each of the ranks, a number that changes while it lives, and the section it left."""
        with self._one_at_a_time:
            told = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return [tuple(map(int, beat.split())) for beat in told]  # type: ignore[misc]

    def tell_place(self, place: Place) -> None:
        """How far this process is."""
        with self._one_at_a_time:
            if place != self._place:
                self._store.set(f"place/{self.rank}", json.dumps(place))
                self._place = place

    def places(self, ranks: list[int]) -> dict[int, Place]:
        """How far this process is, and others."""
        with self._one_at_a_time:
            told = self._store.multi_get([f"place/{rank}" for rank in ranks])
        others = {rank: Place(*json.loads(text)) for rank, text in zip(ranks, told, strict=True)}
        return {**others, self.rank: self._place}

    def fail(self, section: int, failure: RankFailure) -> tuple[RankFailure, bool]:
        """Tell the failure of a section: the first one that was told, and whether it is this."""
        text = json.dumps({"by": self.rank, **asdict(failure)})
        with self._one_at_a_time:
            first = self._store.compare_set(f"failed/{section}", "", text)
        return _read(first), first.decode() == text

    def failure(self, section: int) -> RankFailure | None:
        """The first one of a section, or None."""
        key = f"failed/{section}"
        with self._one_at_a_time:
            return _read(self._store.get(key)) if self._store.check([key]) else None

    def acknowledge(self, section: int) -> None:
        """This process knows the failure of a section; it may be said twice."""
        with self._one_at_a_time:
            if self._acknowledged != section:
                self._acknowledged = section
                self._store.add(f"known/{section}", 1)

    def arrive(self, section: int, where: str) -> None:
        """This process has come to a place where all are to meet; said once."""
        with self._one_at_a_time:
            self._store.add(f"met/{section}/{where}", 1)

    def all_arrived(self, section: int, where: str) -> bool:
        """Whether all processes have come there."""
        with self._one_at_a_time:
            return bool(self._store.add(f"met/{section}/{where}", 0) >= len(self.processes))

    def all_know(self, section: int) -> bool:
        """Whether all processes know the failure of a section, or have left it."""
        with self._one_at_a_time:
            return bool(self._store.add(f"known/{section}", 0) >= len(self.processes))


def _store_of_job() -> Any:
    world: Any = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    return dist.distributed_c10d._get_default_store()  # as of torch 2.8


def _read(text: bytes) -> RankFailure:
    told = json.loads(text)
    del told["by"]
    return RankFailure(**told)
