"""The lock of a store's root: one writer at a time."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path
from threading import Lock

from robo_orchard_lab.pipeline.checkpoint.folder_names import LOCK
from robo_orchard_lab.pipeline.errors import StoreLockedError

logger = logging.getLogger(__name__)

# A process's lock on a file does not hold against itself, and ends when it closes any
# descriptor of the file.
_held_here: dict[tuple[int, int], str] = {}
_registry = Lock()

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MAX_TEXT = 4096


class RootLock:
    """Held by whoever writes into a root; the system frees it when its process ends."""

    def __init__(self, root: Path) -> None:
        """Take it.

        Raises:
            StoreLockedError: someone has it; the message names them.
            OSError: the lock's file can't be written.
        """
        found = os.stat(root)
        self._key = (found.st_dev, found.st_ino)
        self.is_real = True
        """False where the file system has no locks, so that others may write as well."""
        text = _who()
        with _registry:
            if self._key in _held_here:
                raise _locked(root, _held_here[self._key])
            self._file: int | None = self._open(root, text)
            _held_here[self._key] = text

    def _open(self, root: Path, text: str) -> int:
        import fcntl  # not on Windows, where the rest of the package can be imported

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(root / LOCK, flags, 0o666)
        try:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    other = os.pread(file, _MAX_TEXT, 0).decode("utf-8", "replace").strip()
                    raise _locked(root, other or "another process") from None
                if error.errno not in _NO_LOCKS:
                    raise
                self.is_real = False
                logger.warning(
                    "%s: the file system has no locks (%s); make sure that no other run saves "
                    "there, since nothing else does",
                    *(root, error.strerror),
                )
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode()[:_MAX_TEXT], 0)
        except BaseException:
            os.close(file)
            raise
        return file

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        with _registry:
            if self._file is not None:
                os.ftruncate(self._file, 0)
                os.close(self._file)
                self._file = None
                _held_here.pop(self._key, None)


def _who() -> str:
    command = shlex.join(sys.argv) if sys.argv and sys.argv[0] else sys.executable
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({command:.1000}), since {since}"


def _locked(root: Path, who: str) -> StoreLockedError:
    return StoreLockedError(
        f"{root} is being written to by {who}; stop that one, or give this one another folder"
    )
