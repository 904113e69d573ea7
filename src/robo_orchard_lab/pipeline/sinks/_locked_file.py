"""A file that only one process appends to."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import IO


def open_to_append(path: Path) -> IO[bytes] | None:
    """The file, locked until it is closed or the process ends; None if another process has it.

    Processes that this one has started don't hold the lock. This one gives it up when it closes
    the file, also when it opens it a second time and closes that. Where the file system has no
    locks, and on Windows, nothing is locked.
    """
    file = path.open("a+b")
    if sys.platform != "win32":
        import fcntl

        try:
            with suppress(NotImplementedError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:
            pass
    return file
