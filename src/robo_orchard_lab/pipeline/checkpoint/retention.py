"""Which checkpoints stay."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robo_orchard_lab.pipeline.checkpoint.listing import Listing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointInfo,
    PruneDecision,
    ReadLimits,
    kept_name,
    leftover_of,
    set_aside_name,
    trash_name,
)
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import verify_checkpoint
from robo_orchard_lab.pipeline.checkpoint.writer import put_new
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError
from robo_orchard_lab.pipeline.run.durable import flush_folder, remove_folder

# --- retention -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept: a checkpoint that any of the rules keeps, stays. Without ``keep_last``, all do.

    Raises:
        PipelineConfigError: a number is too small, or there is no metric to be the best by.

    >>> Retention(keep_last=3, keep_every=1000).keep_best
    0
    """

    keep_last: int | None = None
    """The newest so many; None: all."""
    keep_every: int | None = None
    """Those whose step is a multiple of it."""
    keep_best: int = 0
    """So many of those with the best value of ``monitor``, of equal ones the oldest."""
    monitor: str | None = None
    """A name in the checkpoints' metrics; also says which one is "best"."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_every", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise PipelineConfigError(f"Retention.{name} must be >= {least}, got {value!r}")
        if self.mode not in ("min", "max"):
            raise PipelineConfigError(f"Retention.mode must be 'min' or 'max', got {self.mode!r}")
        if self.keep_best and self.monitor is None:
            raise PipelineConfigError(
                "Retention.keep_best needs to know by which metric; name it as monitor"
            )

    def best(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those that have a value of ``monitor`` that is a number, the best one first."""
        if self.monitor is None:
            return []
        sign = 1 if self.mode == "min" else -1
        values = [(info.metrics.get(self.monitor, math.nan), info) for info in infos]
        ranked = [
            (sign * value, info.serial, info) for value, info in values if not math.isnan(value)
        ]
        return [info for *_, info in sorted(ranked, key=lambda found: found[:2])]

    def reasons(self, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
        """Why each checkpoint that stays does, by its serial."""
        ordered = sorted(infos, key=lambda info: info.serial, reverse=True)
        if self.keep_last is None:
            return {info.serial: "all are kept" for info in ordered}
        found: dict[int, list[str]] = {}

        def keep(info: CheckpointInfo, why: str) -> None:
            found.setdefault(info.serial, []).append(why)

        for info in ordered[: self.keep_last]:
            keep(info, f"one of the last {self.keep_last}")
        for info in ordered:
            if self.keep_every is not None and info.step % self.keep_every == 0:
                keep(info, f"its step is a multiple of {self.keep_every}")
        for place, info in enumerate(self.best(ordered)[: self.keep_best], 1):
            assert self.monitor is not None  # else there is no best
            value = info.metrics[self.monitor]
            keep(info, f"number {place} by {self.monitor}, with {value:g}")
        return {serial: "; ".join(reasons) for serial, reasons in found.items()}


# --- removal ---------------------------------------------------------------------------------
# Removing and replacing checkpoints, such that a crash leaves whole ones.


logger = logging.getLogger(__name__)


def remove_checkpoint(path: Path, limits: ReadLimits) -> str | None:
    """Remove a checkpoint, by way of another name; or say why it stays.

    Raises:
        OSError: it can't be renamed.
    """
    reason = _not_ours(path, limits)
    if reason is not None:
        return reason
    with _unread(path) as free:
        if not free:
            return "it is being read"
        trash = path.with_name(trash_name(path.name))
        os.rename(path, trash)
        flush_folder(path.parent)  # else half of it might be found under its name after a crash
        remove_folder(trash)
    return None


def put_replacing(temporary: Path, folder: Path, limits: ReadLimits) -> None:
    """Make a complete temporary folder the checkpoint, also where there is one.

    What was there is put aside, and removed when the new one is on the disk; what can't be told for
    a checkpoint, or has files of someone's in it, stays under another name.

    Raises:
        FileExistsError: there is something else than a folder.
    """
    if not os.path.lexists(folder):
        put_new(temporary, folder)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"{folder} is not a checkpoint's folder; move it away")
    reason = _not_ours(folder, limits)
    name = set_aside_name(folder.name) if reason is None else kept_name(folder.name)
    aside = folder.with_name(name)
    if reason is not None:
        logger.warning("%s is replaced, and what was there stays as %s: %s", folder, name, reason)
    os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except BaseException:
        os.rename(aside, folder)
        raise
    flush_folder(folder.parent)
    if reason is None:
        _remove_unread(aside)


def clean_leftovers(root: Path, limits: ReadLimits) -> None:
    """Remove what a crash, or a reader, has left in a root; put back what was put aside last.

    Only to be called where nobody writes into the root.
    """
    found = [(name, leftover_of(name)) for name in sorted(os.listdir(root))]
    leftovers = [(root / name, *leftover) for name, leftover in found if leftover]
    for path, of, kind in leftovers:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        elif kind == "old" and not os.path.lexists(root / of) and _is_whole(path, limits):
            os.rename(path, root / of)
            logger.warning("%s was being replaced when its run ended; it is back", root / of)
        else:
            _remove_unread(path)
    if leftovers:
        flush_folder(root)


def _not_ours(path: Path, limits: ReadLimits) -> str | None:
    """Why a folder may not be removed, going by its manifest; None where it may."""
    try:
        with OpenCheckpoint(path, limits) as opened:
            own = {MANIFEST_FILE, *opened.manifest.files}
    except CheckpointError as error:
        return f"it can't be told for a checkpoint: {error}"
    foreign = sorted(set(os.listdir(path)) - own)
    return f"it has files that are not of a checkpoint: {', '.join(foreign)}" if foreign else None


def _is_whole(path: Path, limits: ReadLimits) -> bool:
    try:
        OpenCheckpoint(path, limits).close()
    except CheckpointError:
        return False
    return True


def _remove_unread(path: Path) -> None:
    """Remove a folder of ours unless someone reads it; then the next cleaning does."""
    with _unread(path) as free:
        if free:
            remove_folder(path)


@contextmanager
def _unread(path: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint, nor will within."""
    import fcntl  # not on Windows, where the rest of the package can be imported

    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path / MANIFEST_FILE, flags)
    except OSError:
        yield True  # a reader would not get further, either
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # the file system has no such locks
            free = True
        yield free
    finally:
        os.close(descriptor)


# --- pruning ---------------------------------------------------------------------------------
# Removing what no rule keeps.


def prune(
    listing: Listing,
    retention: Retention,
    limits: ReadLimits,
    *,
    good: CheckpointInfo | None,
    dry_run: bool,
) -> list[PruneDecision]:
    """Carry out a retention, and say of each checkpoint what became of it and why.

    Args:
        good: the newest that is known to be as it was written; None: to be found by reading.
        dry_run: only say what would be.
    """
    kept = retention.reasons(listing.infos)
    leaving = [info for info in listing.infos if info.serial not in kept]
    if leaving and good is None:
        good = _newest_good(listing.infos, limits)
    if good is not None:
        kept.setdefault(good.serial, "the newest one that verifies")
    decisions = [
        PruneDecision(path, False, f"it can't be told for a checkpoint: {why}")
        for path, why in listing.broken
    ]
    for info in listing.infos:
        why = kept.get(info.serial)
        if why is None and good is None:
            why = "no checkpoint verifies"
        if why is None and not dry_run:
            why = remove_checkpoint(info.path, limits)
        decisions.append(PruneDecision(info.path, why is None, why or "no rule keeps it"))
    return decisions


def _newest_good(infos: Sequence[CheckpointInfo], limits: ReadLimits) -> CheckpointInfo | None:
    for info in reversed(infos):
        if verify_checkpoint(info.path, limits).problem is None:
            return info
    return None
