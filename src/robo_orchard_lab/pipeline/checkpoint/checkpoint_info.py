"""What a checkpoint is, what is in it, and what was found about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint's manifest says of it."""

    path: Path
    step: int
    serial: int
    """The how many-th save into its root it was, from 1; it orders them, also where a run has gone
    back to an earlier step. 0 for one that was not saved by a store."""
    saved_at: datetime
    """In UTC."""
    size_bytes: int
    """Of all its files, without the manifest."""
    ranks: int
    """How many processes saved it."""
    digest: str
    """The name of the digest that its files are verified by."""
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]


EachRank: TypeAlias = Callable[[int, int, Mapping[str, Any]], Any]
"""Called with the number of a rank, of how many that saved, and what it had for itself; gives what
is to be kept of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What was saved, verified and read to the CPU.

    The tensors of one part share one block of memory, which is there as long as one of them is.
    """

    parts: Mapping[str, Any]
    """Of the whole job, by name."""
    of_rank: Mapping[str, Any]
    """Of the rank that has the number of this one; where fewer saved, of the last."""
    info: CheckpointInfo
    of_ranks: tuple[Any, ...] = ()
    """Where as many ranks saved as load, or nobody asked: nothing. Else what ``each_rank`` gave."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that did not verify, and why."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether everything in a checkpoint is as it was written."""

    path: Path
    problem: str | None
    """None where it is."""


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """Whether a checkpoint is removed, and why."""

    path: Path
    removed: bool
    """With ``dry_run``: whether it would be."""
    why: str
