"""Ranks that do by themselves what all of them have to do together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from robo_orchard_lab.pipeline.errors import RankFailure


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
                "A hook has to ask on every rank, or with alone=True",
            )
    return None
