"""What a checkpoint is, what is in it, and what was found about it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from robo_orchard_lab.pipeline.errors import PipelineConfigError

# --- folder names ----------------------------------------------------------------------------
# The names in a store's root: of checkpoints, and of what a crash may leave.


LOCK = ".lock"
LAST = "last"
BEST = "best"

_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,18})")
# With what is named by durable.temporary_name.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,19}|last|best)\.[0-9a-f]{32}\.(tmp|old|trash)")


def step_folder(step: int) -> str:
    """The name of a checkpoint's folder.

    >>> step_folder(1234)
    'step_00001234'
    """
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder is named for; None for any other name.

    >>> step_of("step_00001234"), step_of("step_1234"), step_of("last")
    (1234, None, None)
    """
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def set_aside_name(name: str) -> str:
    """What ``name`` is called while another takes its place; without that other, it is put back."""
    return f".{name}.{uuid.uuid4().hex}.old"


def trash_name(name: str) -> str:
    """What ``name`` is called while its files are removed."""
    return f".{name}.{uuid.uuid4().hex}.trash"


def kept_name(name: str) -> str:
    """What ``name`` is called, from when another takes its place, where it is never removed."""
    return f"{name}.kept-{uuid.uuid4().hex[:8]}"


def leftover_of(name: str) -> tuple[str, str] | None:
    """The name it was to have, and the kind, of what a crash has left; None for any other name.

    >>> leftover_of(".step_00000003.0123456789abcdef0123456789abcdef.tmp")
    ('step_00000003', 'tmp')
    """
    found = _LEFTOVER.fullmatch(name)
    return (found[1], found[2]) if found else None


# --- limits ----------------------------------------------------------------------------------
# How much of a stranger's checkpoint is looked at before it is refused.


MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """The most that a checkpoint may have of anything; what has more is refused, not read.

    They hold for writing, too, so that what was saved can be loaded with the same limits.

    Raises:
        PipelineConfigError: a limit is below 1.

    >>> ReadLimits(max_json_depth=10).max_json_depth
    10
    """

    max_files: int = 65_536
    """Of all ranks together, without the manifest."""
    max_manifest_bytes: int = 16 * MIB
    max_json_bytes: int = 64 * MIB
    """Of one part's JSON. Reading it takes up to some 25 times as much memory."""
    max_json_depth: int = 100
    """How deep lists and mappings may lie in one another."""
    max_header_bytes: int = 100_000_000
    """Of one file's list of tensors; the limit of safetensors itself."""
    max_tensors: int = 1_000_000
    """In one file."""
    max_total_bytes: int | None = None
    """Of all that one rank reads, the job's and ranks' together; None: as much as the machine has
    memory available."""
    any_owner: bool = False
    """Whether to read what belongs neither to the own user nor to root."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise PipelineConfigError(f"ReadLimits.{field.name} must be >= 1, got {value}")


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
