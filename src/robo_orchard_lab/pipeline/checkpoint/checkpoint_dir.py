"""A checkpoint's folder, of which files are opened without following anything out of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint.info import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.errors import CheckpointError


class HeldFolder:
    """A folder that is held open, so that all files are of one, whatever its path leads to later.

    The path may lead through links to the folder; no link in it is followed.
    """

    def __init__(self, path: str | os.PathLike[str], limits: ReadLimits) -> None:
        """Open it.

        Raises:
            CheckpointError: there is none, or it is that of an owner who is not trusted.
        """
        try:
            self.path = Path(path).resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise CheckpointError(f"{path} leads nowhere: {error}") from error
        self._limits = limits
        self._descriptor = self._open()

    def close(self) -> None:
        """Let it be removed again."""
        os.close(self._descriptor)

    def open_file(self, name: str, max_bytes: int | None = None) -> int:
        """A descriptor of a regular file of the folder itself, of an owner who is trusted.

        Raises:
            CheckpointError: there is none, or it has more than ``max_bytes``.
        """
        path = self.path / name
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
            hint = self._checkpoints_in_it() if name == MANIFEST_FILE else ""
            raise CheckpointError(f"{path} can't be read: {reason}{hint}") from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} can't be read: it is not a regular file")
            _check_owner(path, found, self._limits)
            if max_bytes is not None and found.st_size > max_bytes:
                raise CheckpointError(
                    f"{path} has {found.st_size} bytes; at most {max_bytes} are read"
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open(self) -> int:
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {self.path}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror}") from error
        try:
            _check_owner(self.path, os.fstat(descriptor), self._limits)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _checkpoints_in_it(self) -> str:
        """A hint for whoever names the folder of a run, or of its checkpoints."""
        found = sorted(self.path.glob("last/manifest.json")) or sorted(
            self.path.glob("*/last/manifest.json")
        )
        return f"; did you mean {found[0].parent}?" if found else ""


def _check_owner(path: Path, found: os.stat_result, limits: ReadLimits) -> None:
    own = os.geteuid()
    if found.st_uid not in (own, 0) and not limits.any_owner:
        raise CheckpointError(
            f"{path} belongs to user {found.st_uid}, expected {own} or root; if they are trusted, "
            "take a copy of your own, or load with ReadLimits(any_owner=True)"
        )
