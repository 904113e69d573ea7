"""Retention: rules for keeping checkpoints, crash-safe removal and replacement, cleanup."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robo_orchard_lab.pipeline.checkpoint.listing import Listing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointInfo,
    PruneDecision,
    ReadLimits,
    hidden_name,
    kept_name,
    leftover_of,
)
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import verify_checkpoint
from robo_orchard_lab.pipeline.checkpoint.writer import put_new
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError
from robo_orchard_lab.pipeline.run.durable import flush_folder, remove_folder

logger = logging.getLogger(__name__)

# --- rules -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Rules for keeping checkpoints; any rule can keep a checkpoint.

    Without ``keep_last``, all checkpoints stay.

    Raises:
        PipelineConfigError: a number is too small, or ``keep_best`` lacks a metric.

    >>> Retention(keep_last=3, keep_every=1000).keep_best
    0
    """

    keep_last: int | None = None
    """Number of the newest checkpoints to keep; None: all."""
    keep_every: int | None = None
    """Keep checkpoints whose step is a multiple."""
    keep_best: int = 0
    """Number of checkpoints with the best value of ``monitor``; the older one wins a tie."""
    monitor: str | None = None
    """Name of a saved metric; also decides which checkpoint is "best"."""
    mode: Literal["min", "max"] = "min"
    """``"min"`` if the smallest value is best, ``"max"`` if the largest."""

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_every", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise PipelineConfigError(f"Retention.{name} must be >= {least}, got {value!r}")
        if self.mode not in ("min", "max"):
            raise PipelineConfigError(f"Retention.mode must be 'min' or 'max', got {self.mode!r}")
        if self.keep_best and self.monitor is None:
            raise PipelineConfigError("Retention.keep_best requires a metric; name it as monitor")

    def best(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Return the healthy checkpoints with a finite value of ``monitor``, best first."""
        if self.monitor is None:
            return []
        sign = 1 if self.mode == "min" else -1
        values = [(info.metrics.get(self.monitor, math.nan), info) for info in infos]
        ranked = [
            (sign * value, info.serial, info)
            for value, info in values
            if math.isfinite(value) and not info.poison
        ]
        return [info for *_, info in sorted(ranked, key=lambda found: found[:2])]

    def reasons(self, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
        """Return the reason to keep each kept checkpoint, by serial."""
        ordered = sorted(infos, key=lambda info: info.serial, reverse=True)
        if self.keep_last is None:
            return {info.serial: "all are kept" for info in ordered}
        found: dict[int, list[str]] = defaultdict(list)
        for info in ordered[: self.keep_last]:
            found[info.serial].append(f"one of the last {self.keep_last}")
        for info in ordered:
            if self.keep_every is not None and info.step % self.keep_every == 0:
                found[info.serial].append(f"its step is a multiple of {self.keep_every}")
        for number, info in enumerate(self.best(ordered)[: self.keep_best], 1):
            assert self.monitor is not None  # else nothing is best
            value = info.metrics[self.monitor]
            found[info.serial].append(f"number {number} by {self.monitor}, with {value:g}")
        return {serial: "; ".join(reasons) for serial, reasons in found.items()}


def prune(
    listing: Listing,
    retention: Retention,
    limits: ReadLimits,
    *,
    good: CheckpointInfo | None,
    dry_run: bool,
) -> list[PruneDecision]:
    """Remove checkpoints without a reason to stay; return a decision for each checkpoint.

    The newest healthy checkpoint that verifies stays, or without one the newest that verifies.

    ``good`` is that checkpoint if known; None finds it by reading. A dry run only decides.
    """
    kept, to_resume = retention.reasons(listing.infos), listing.to_resume
    leaving = [info for info in listing.infos if info.serial not in kept]
    if leaving and good is None:
        intact = (i for i in to_resume if not verify_checkpoint(i.path, limits).problem)
        good = next(intact, None)
    if good is not None:
        is_followed = any(i.poison for i in listing.infos if i.serial > good.serial)
        what = "healthy one: newer ones are not finite" if is_followed else "one that verifies"
        kept.setdefault(good.serial, f"the newest {what}")
    decisions = [
        PruneDecision(path, False, f"not a valid checkpoint: {why}") for path, why in listing.broken
    ]
    for info in listing.infos:
        why = kept.get(info.serial)
        if why is None and good is None:
            why = "no checkpoint verifies"
        if why is None and not dry_run:
            why = _remove_checkpoint(info.path, limits)
        decisions.append(PruneDecision(info.path, why is None, why or "no rule keeps it"))
    return decisions


# --- crash-safe removal and replacement ------------------------------------------------------


def _remove_checkpoint(path: Path, limits: ReadLimits) -> str | None:
    """Remove a checkpoint, renamed before; return the reason if the checkpoint stays."""
    reason = _foreign_reason(path, limits)
    if reason is None and not _remove_unread(path, hide=True):
        reason = "it is being read"
    return reason


def put_replacing(temporary: Path, folder: Path, limits: ReadLimits) -> None:
    """Rename a complete temporary directory to a checkpoint, replacing an existing checkpoint.

    The replaced checkpoint is removed once the new one is on the disk. A directory that is not a
    valid checkpoint, or has foreign files, is kept under another name.

    Raises:
        FileExistsError: the name belongs to a file or a link.
    """
    if not os.path.lexists(folder):
        put_new(temporary, folder)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"{folder} is not a checkpoint's directory; move it away")
    reason = _foreign_reason(folder, limits)
    name = hidden_name(folder.name, "old") if reason is None else kept_name(folder.name)
    aside = folder.with_name(name)
    if reason is not None:
        logger.warning("%s is replaced; its old contents are kept as %s: %s", folder, name, reason)
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
    """Remove the leftovers of a crash; restore a checkpoint whose replacement was interrupted.

    Requires the lock of the root.
    """
    found = [(name, leftover_of(name)) for name in sorted(os.listdir(root))]
    leftovers = [(root / name, *leftover) for name, leftover in found if leftover]
    for path, of, kind in leftovers:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        elif kind == "old" and not os.path.lexists(root / of) and _has_manifest(path, limits):
            os.rename(path, root / of)
            logger.warning("restored %s, whose replacement was interrupted", root / of)
        else:
            _remove_unread(path)
    if leftovers:
        flush_folder(root)


def _foreign_reason(path: Path, limits: ReadLimits) -> str | None:
    """Return the reason to keep a directory, from its manifest; None to allow removal."""
    try:
        with OpenCheckpoint(path, limits) as opened:
            own = {MANIFEST_FILE, *opened.manifest.files}
    except CheckpointError as error:
        return f"not a valid checkpoint: {error}"
    foreign = sorted(set(os.listdir(path)) - own)
    return f"it has files that are not of a checkpoint: {', '.join(foreign)}" if foreign else None


def _has_manifest(path: Path, limits: ReadLimits) -> bool:
    try:
        OpenCheckpoint(path, limits).close()
    except CheckpointError:
        return False
    return True


def _remove_unread(path: Path, *, hide: bool = False) -> bool:
    """Remove a checkpoint unless a process reads it, and keep new readers out meanwhile.

    Returns:
        True if removed; otherwise a later cleanup tries again. With ``hide``, the directory is
        renamed first, since a crash could leave half a checkpoint under its name.
    """
    import fcntl  # not available on Windows

    descriptor = None
    try:
        with suppress(OSError):  # a reader could not open the manifest, either
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path / MANIFEST_FILE, flags)
        try:
            if descriptor is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # the file system has no such locks
            pass
        if hide:
            trash = path.with_name(hidden_name(path.name, "trash"))
            os.rename(path, trash)
            flush_folder(path.parent)
            path = trash
        remove_folder(path)
        return True
    finally:
        if descriptor is not None:
            os.close(descriptor)
