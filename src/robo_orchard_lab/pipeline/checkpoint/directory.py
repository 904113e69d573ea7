"""Files of a checkpoint directory, possibly damaged or untrusted, opened without torch.

:class:`CheckpointDir` opens files without following links; :class:`CheckpointFiles` verifies the
manifest, the sizes of all files and JSON files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from robo_orchard_core.utils.strict_json import JsonError, json_values, parse_json
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ReadLimits,
    check_sums,
    digest_of,
    parse_manifest,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import CheckpointError

_MAX_HOLE_BYTES = 1 << 26
_MAX_HOLE_RATIO = 64  # beyond any compression of real tensors


class CheckpointDir:
    """Open directory; all files come from this directory, even if its path changes.

    The path to the directory may contain links; links inside the directory are refused.
    """

    def __init__(self, path: str | os.PathLike[str], limits: ReadLimits) -> None:
        """Open the directory.

        Raises:
            CheckpointError: the directory does not exist, or its owner is not trusted.
        """
        try:
            self.path = Path(path).resolve()
        except (OSError, RuntimeError) as error:  # circular links
            raise CheckpointError(f"{path} leads nowhere: {error}") from error
        self._limits = limits
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {self.path}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror}") from error
        try:
            _check_owner(self.path, os.fstat(self._descriptor), limits)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the directory."""
        os.close(self._descriptor)

    def open_file(self, name: str, max_bytes: int | None = None) -> int:
        """Open a regular file of the directory and return its descriptor.

        Raises:
            CheckpointError: the file does not exist, is a link, belongs to an untrusted owner, or
                has more than ``max_bytes``.
        """
        path = self.path / name
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
            hint = self._nested_checkpoint() if name == MANIFEST_FILE else ""
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

    def _nested_checkpoint(self) -> str:
        """Suggest a checkpoint if the path is a run's directory or a store's root."""
        found = sorted(self.path.glob("last/manifest.json")) or sorted(
            self.path.glob("*/last/manifest.json")
        )
        return f"; did you mean {found[0].parent}?" if found else ""


def _check_owner(path: Path, found: os.stat_result, limits: ReadLimits) -> None:
    own = os.geteuid()
    if found.st_uid not in (own, 0) and not limits.any_owner:
        raise CheckpointError(
            f"{path} belongs to user {found.st_uid}, expected {own} or root; if you trust that "
            "user, copy the checkpoint, or load it with ReadLimits(any_owner=True)"
        )


class CheckpointFiles:
    """Files of a checkpoint, protected from removal; a context manager.

    The path to the directory may contain links; links inside the directory are refused.
    """

    def __init__(self, path: str | os.PathLike[str], limits: ReadLimits) -> None:
        """Open the directory and verify its manifest.

        Raises:
            CheckpointError: the checkpoint does not exist or can't be trusted.
        """
        self._dir = CheckpointDir(path, limits)
        self.path = self._dir.path
        self._limits = limits
        self._manifest: int | None = None
        self._hole_bytes = self._data_bytes = 0
        try:
            self._manifest = self._dir.open_file(MANIFEST_FILE, limits.max_manifest_bytes)
            self._lock_shared()
            text = _read(self._manifest, os.fstat(self._manifest).st_size)
            with self._in_file(MANIFEST_FILE):
                self.manifest: Manifest = parse_manifest(text, limits)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the checkpoint and allow its removal."""
        if self._manifest is not None:
            os.close(self._manifest)
            self._manifest = None
        self._dir.close()

    def check_sizes(self) -> None:
        """Compare the sizes of all files with the manifest.

        Raises:
            CheckpointError: a file is missing or has another size.
        """
        for name, entry in self.manifest.files.items():
            with self._in_file(name):
                os.close(self._open_entry(name, entry))

    def read_json(self, name: str) -> Any:
        """Verify and parse one JSON file, without decoding the state that it holds.

        Raises:
            CheckpointError: the file is missing, was changed, or exceeds the limits.
        """
        entry, limits = self.manifest.files[name], self._limits
        with self._in_file(name), closing_file(self._open_entry(name, entry)) as descriptor:
            check_sums(CheckpointError, limits, max_json_bytes=entry.size)
            text = _read(descriptor, entry.size)
            check_digest(digest_of(self.manifest.digest_name, text), entry)
            check_sums(CheckpointError, limits, max_json_values=json_values(text))
            try:
                return parse_json(text, max_depth=limits.max_json_depth)
            except JsonError as error:
                raise CheckpointError(str(error)) from error

    def _open_entry(self, name: str, entry: FileEntry) -> int:
        descriptor = self._dir.open_file(name)
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.size:
                raise CheckpointError(f"expected {entry.size} bytes, found {size}")
            self._check_holes(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_holes(self, descriptor: int, size: int) -> None:
        """Refuse sparse files that have far fewer bytes on the disk than they claim."""
        data, holes = data_and_holes(descriptor, size)
        self._data_bytes += data
        self._hole_bytes += holes
        refuse_sparse(size, self._data_bytes, self._hole_bytes)

    def _lock_shared(self) -> None:
        """Keep others from removing the checkpoint, if the file system supports locks."""
        import fcntl  # not available on Windows; filelock has no shared locks

        assert self._manifest is not None
        try:
            fcntl.flock(self._manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.path} is being removed") from None
        except OSError:
            pass

    @contextmanager
    def _in_file(self, name: str) -> Iterator[None]:
        """Add the file's path to errors."""
        try:
            yield
        except CheckpointError as error:
            if str(self.path) in str(error):
                raise
            raise CheckpointError(f"{self.path / name}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path / name} can't be read: {error.strerror}") from error


def _read(descriptor: int, size: int) -> bytes:
    pieces = []
    while size:
        piece = os.read(descriptor, size)
        if not piece:
            raise CheckpointError("it was truncated while it was read")
        pieces.append(piece)
        size -= len(piece)
        record_heartbeat()
    return b"".join(pieces)


def data_and_holes(descriptor: int, size: int) -> tuple[int, int]:
    """Count the bytes of a file on the disk and in holes; all are data if unknown."""
    begin = holes = 0
    try:
        while (hole := os.lseek(descriptor, begin, os.SEEK_HOLE)) < size:
            try:
                begin = os.lseek(descriptor, hole, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                begin = size
            holes += begin - hole
            if begin == size:
                break
    except OSError:
        return size, 0  # the file system can't tell
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return size - holes, holes


def refuse_sparse(size: int, data: int, holes: int) -> None:
    """Refuse a file with far fewer bytes on the disk than its size."""
    if holes > _MAX_HOLE_BYTES + _MAX_HOLE_RATIO * data:
        raise CheckpointError(
            f"of its {size} bytes, few are on the disk: it is a sparse file; if you trust it, copy "
            "it with cp --sparse=never"
        )


def check_digest(digest: str, entry: FileEntry) -> None:
    """Refuse a file whose digest differs from its entry in the manifest."""
    if digest != entry.digest:
        raise CheckpointError(f"its digest is {digest}, expected {entry.digest}: it was changed")


@contextmanager
def closing_file(descriptor: int) -> Iterator[int]:
    """Close a file at the end of a block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
