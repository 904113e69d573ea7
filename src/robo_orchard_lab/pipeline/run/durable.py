"""Durable files: writes, atomic replaces and directories that are flushed to disk.

:class:`RetriedWrite` reports writes that fail for a moment, as on a full disk: once, then their
success."""

from __future__ import annotations

import errno
import glob
import itertools
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat

if TYPE_CHECKING:
    from filelock import BaseFileLock

# Linux writes at most 2 GiB per call. Each call releases the interpreter lock, and a busy thread
# returns it after 5 ms.
_PIECE_BYTES = 1 << 30
_PAGE_BYTES = 4096
_PAST_CACHE_FROM = 1 << 20
_HEX = "[0-9a-f]" * 32
_OLD = ".old"  # of a folder during its replacement
# A file system without locks answers with one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def temporary_name(name: str) -> str:
    """Return a temporary name for a file that will be renamed to ``name``."""
    return f".{name}.{uuid.uuid4().hex}.tmp"


def remove_leftovers(path: Path) -> None:
    """Remove what a killed writer of a file or folder left. Call without other writers.

    A folder whose replacement was interrupted is restored.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HEX}{_OLD}"):
        if os.path.lexists(path):
            remove_folder(left)
        else:
            os.rename(left, path)
    for left in find_leftovers(path.parent, path.name):
        if left.is_dir() and not left.is_symlink():
            remove_folder(left)
        else:
            left.unlink(missing_ok=True)


def find_leftovers(folder: Path, name: str | None = None, within: str = "") -> Iterator[Path]:
    """Iterate over temporary files of a name, or of all; ``within="**/"`` adds inner folders."""
    name = "*" if name is None else glob.escape(name)
    return folder.glob(f"{within}.{name}.{_HEX}.tmp")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write and flush a new file.

    Raises:
        OSError: the write failed, or the path exists.
    """
    with path.open("xb", buffering=0) as file:
        rest = memoryview(data)
        rest = rest[_write_past_cache(file.fileno(), rest) :]
        while rest.nbytes:
            rest = rest[os.write(file.fileno(), rest[:_PIECE_BYTES]) :]
            record_heartbeat()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Replace a file atomically, after the new content is flushed.

    Raises:
        OSError: the write failed; the old file is unchanged.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a folder by a new one, after its content is flushed.

    A reader finds the old or the new folder complete, and, between two renames, none. The parent
    folder must exist and be writable.

    Args:
        path: folder to replace; created if missing, and a link is followed.
        write: function that fills the new folder, which is empty.

    Raises:
        OSError: the folder can't be written; the old one is unchanged.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(temporary_name(path.name))
    old = temporary.with_suffix(_OLD)
    try:
        temporary.mkdir()
        write(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                flush_file(Path(folder, name))
            flush_folder(Path(folder))
        is_replaced = os.path.lexists(path)
        if is_replaced:
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            if is_replaced:
                os.rename(old, path)
            raise
    except BaseException:
        remove_folder(temporary)
        raise
    flush_folder(path.parent)
    remove_folder(old)


def _write_past_cache(descriptor: int, data: memoryview) -> int:
    """Write complete pages with O_DIRECT, past the page cache, where supported.

    Data that is flushed at once does not profit from the cache: 307 MB cost 100 ms instead of
    160 ms, and hardly any CPU time. Returns the number of bytes written, may be 0.
    """
    if sys.platform != "linux" or data.nbytes < _PAST_CACHE_FROM:
        return 0
    if np.frombuffer(data, dtype=np.uint8).ctypes.data % _PAGE_BYTES:
        return 0
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    end = data.nbytes - data.nbytes % _PAGE_BYTES
    done = 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < end and not done % _PAGE_BYTES:
            done += os.write(descriptor, data[done : min(end, done + _PIECE_BYTES)])
            record_heartbeat()
    except OSError as error:
        if error.errno != errno.EINVAL:  # unsupported, or larger pages required
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def flush_folder(path: Path) -> None:
    """Flush the entries of a directory to disk."""
    if sys.platform != "win32":  # not supported
        flush_file(path)


def flush_file(path: Path) -> None:
    """Flush a file that another library has written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a directory and missing parents, and flush them."""
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Replace ``path`` atomically by a symbolic link to ``target``.

    Raises:
        OSError: the link can't be created, for example because ``path`` is a directory.
    """
    if path.is_symlink() and os.readlink(path) == target:
        return
    temporary = path.with_name(temporary_name(path.name))
    os.symlink(target, temporary)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink()
        raise


def set_aside(path: Path) -> Path:
    """Rename a file that can't be read to the first free name, and return the name.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for text in ("first", "second"):
    ...     _ = (folder / "state.json").write_text(text)
    ...     print(set_aside(folder / "state.json").name)
    state.json.unreadable-1
    state.json.unreadable-2

    Raises:
        OSError: the file can't be renamed.
    """
    names = (path.with_name(f"{path.name}.unreadable-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    return aside


def remove_folder(path: Path) -> None:
    """Remove a directory tree; ignores errors."""
    shutil.rmtree(path, ignore_errors=True)


def lock_file(path: Path, holder: str = "") -> BaseFileLock | None:
    """Lock a file, without waiting, until ``release()``, the last reference or the process ends.

    The file is created if missing and stays afterwards; ``holder`` replaces its contents. Forked
    processes do not hold the lock. Returns None if the file system has no locks.

    Raises:
        BlockingIOError: another holder, in this process or another one, has the lock.
        OSError: the file can't be opened for writing.
    """
    from filelock import FileLock, Timeout  # here, since importing the package costs 20 ms

    def write_holder(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())

    lock = FileLock(
        path,
        blocking=False,
        thread_local=False,  # another thread may release the lock
        fallback_to_soft=False,  # a soft lock outlives a killed process
        on_acquired=write_holder if holder else None,
    )
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another holder has the lock", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


_logger = logging.getLogger(__name__)


class RetriedWrite:
    """Report of the failed writes of one output, which do not end the run.

    The first failure is logged as an error, with the writer and the output; so is a later failure
    for another reason. The next success is logged as a warning. The writer tries again by itself.

    Args:
        by: name of the writer, such as a hook.
        logger: logger of the reports.
    """

    def __init__(
        self,
        by: str,
        logger: logging.Logger | logging.LoggerAdapter[logging.Logger] = _logger,
    ) -> None:
        self.by = by
        self.failure: Exception | None = None
        """Error of the last write; None after a success."""
        self._logger = logger
        self._count = 0

    def failed(self, what: str, error: Exception, then: str) -> None:
        """Report a failed write.

        Args:
            what: description of the write, with the file.
            error: the reason.
            then: effect on the run.
        """
        reason = _reason(error)
        if self.failure is None or reason != _reason(self.failure):
            self._logger.error("%s: %s failed; %s: %s", self.by, what, then, reason)
        self.failure = error
        self._count += 1

    def succeeded(self, what: object) -> None:
        """Report a write that succeeded after failures."""
        if self.failure is not None:
            self._logger.warning(
                "%s: %s is written, after %d failed attempts", self.by, what, self._count
            )
            self.failure, self._count = None, 0


def _reason(error: Exception) -> str:
    """Return the text of an error without the names of temporary files."""
    if isinstance(error, OSError):
        text = f"[Errno {error.errno}] {error.strerror}" if error.strerror else str(error)
        return f"{type(error).__name__}: {text}"
    return str(error)


class OutputFile(RetriedWrite):
    """File or folder that is replaced atomically; contents that can't be written stay in memory.

    Args:
        path: path of the file or folder; missing parents are created.
        by: name of the writer.
        is_required: a run that ends without the file fails.
        restore: keep the contents, and write them again if the file disappears.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        by: str,
        *,
        is_required: bool = True,
        restore: bool = False,
    ) -> None:
        super().__init__(by)
        self.path = Path(path)
        self._is_required = is_required
        self._restore = restore
        self._replace: Callable[[], None] | None = None

    def write(self, data: bytes | memoryview) -> bool:
        """Write new contents of a file; return True if they are on the disk."""
        self._replace = partial(replace_file, self.path, data)
        return self._attempt()

    def write_folder(self, write: Callable[[Path], object]) -> bool:
        """Write new contents of a folder; return True if they are on the disk."""
        self._replace = partial(replace_folder, self.path, write)
        return self._attempt()

    def retry(self) -> bool:
        """Write the contents that failed before; return True if the file is complete."""
        is_missing = self._restore and not self.path.exists()
        return self._attempt() if self.failure is not None or is_missing else True

    def error(self) -> OSError | None:
        """Return the error for a run that ends without the file, or None."""
        found = self.failure
        if found is None or not self._is_required:
            return None
        code = found.errno if isinstance(found, OSError) else None
        error = OSError(code, f"{self.by} could not write {self.path}: {_reason(found)}")
        error.__cause__ = found
        return error

    def _attempt(self) -> bool:
        assert self._replace is not None
        try:
            make_folder(self.path.parent)
            self._replace()
        except OSError as error:
            then = "the run continues, and tries again at its next writes"
            self.failed(f"writing {self.path}", error, then)
            return False
        self.succeeded(self.path)
        if not self._restore:
            self._replace = None
        return True
