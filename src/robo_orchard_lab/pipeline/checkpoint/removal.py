"""Removing and replacing checkpoints, such that a crash leaves whole ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint.folder_names import (
    kept_name,
    leftover_of,
    set_aside_name,
    trash_name,
)
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.checkpoint.writer import put_new
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.run.durable import flush_folder, remove_folder

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
