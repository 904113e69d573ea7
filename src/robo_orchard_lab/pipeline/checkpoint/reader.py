"""Reading a checkpoint's folder, which may be damaged or a stranger's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    FileName,
    Manifest,
    ReadLimits,
    SavedState,
    digest_of,
    new_digest,
    parse_manifest,
)
from robo_orchard_lab.pipeline.checkpoint.shards import (
    SavedShard,
    ShardAssembler,
    ShareOf,
    cut,
    shards_of,
)
from robo_orchard_lab.pipeline.checkpoint.state import decode_state
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    LENGTH_BYTES,
    FileLayout,
    allocate_buffer,
    buffer_view,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError


class CheckpointDir:
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


_PIECE_BYTES = 1 << 26
_READERS = 2


class OpenCheckpoint:
    """A checkpoint's folder, held open, so that all files are of one checkpoint and none of them
    is removed meanwhile. To be used as a context manager.

    The path may lead through links to the folder; nothing in it is followed out of it.
    """

    def __init__(self, path: str | os.PathLike[str], limits: ReadLimits) -> None:
        """Open it and read its manifest.

        Raises:
            CheckpointError: there is none, or not one that can be trusted.
        """
        self._folder = CheckpointDir(path, limits)
        self.path = self._folder.path
        self._limits = limits
        self._manifest: int | None = None
        self._sharded: dict[str, dict[str, torch.Tensor]] = {}  # what was read, by part
        self._read_bytes = 0  # of all that was read
        try:
            self._manifest = self._folder.open_file(MANIFEST_FILE, limits.max_manifest_bytes)
            self._hold()
            text = bytes(buffer_view(_read(self._manifest, os.fstat(self._manifest).st_size)))
            with self._in_file(MANIFEST_FILE):
                self.manifest: Manifest = parse_manifest(text, limits)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it be removed again."""
        if self._manifest is not None:
            os.close(self._manifest)
            self._manifest = None
        self._folder.close()

    def load(
        self, rank: int | None, share_of: ShareOf | None = None, only: str | None = None
    ) -> SavedState:
        """Everything that a rank needs of it: what is of the whole job, and what is its own.

        Args:
            rank: whose own it is; None for nobody's, which leaves what is of the whole job.
            share_of: what this rank needs of each tensor that is the job's, or in shards; by
                default all of it. What a rank has saved whole for itself is read whole.
            only: the one part to read; by default all.

        Raises:
            CheckpointError: a file is not as it was written.
        """
        wanted = (None,) if rank is None else (None, self.saved_as(rank))
        found = self._parts_of(*wanted, share_of=share_of, only=only)
        return SavedState(
            parts={part: value for (part, of), value in found.items() if of is None},
            rank_parts={part: value for (part, of), value in found.items() if of is not None},
            info=self.manifest.info(self.path),
        )

    def saved_as(self, rank: int) -> int:
        """The rank that saved what this one goes on from: where fewer saved, the last."""
        return min(rank, self.manifest.ranks - 1)

    def ranks(self, share_of: ShareOf | None = None) -> Iterator[Mapping[str, Any]]:
        """What each rank that saved had for itself, one after the other; read when it is due.

        Args:
            share_of: see :meth:`load`.

        Raises:
            CheckpointError: a file is not as it was written, or a rank has none.
        """
        parsed = map(FileName.parse, self.manifest.files)
        there = {name.rank for name in parsed if name is not None}
        for rank in range(self.manifest.ranks):
            if rank not in there:
                raise CheckpointError(f"{self.path} has nothing of rank {rank}, which saved it")
            found = self._parts_of(rank, share_of=share_of)
            yield {part: value for (part, _), value in found.items()}

    def _parts_of(
        self, *ranks: int | None, share_of: ShareOf | None, only: str | None = None
    ) -> dict[tuple[str, int | None], Any]:
        """The parts of some ranks, and with None those of the whole job; by name and rank."""
        names = [(name, FileName.parse(name)) for name in self.manifest.files]
        wanted: dict[str, FileName] = {}
        shards: dict[str, list[str]] = {}  # the files of each part
        rank_results: set[str] = set()  # parts that ranks have for themselves
        for name, parsed in names:
            if parsed is None or only not in (None, parsed.part):
                continue
            if parsed.is_shards:
                shards.setdefault(parsed.part, []).append(name)
                continue
            if parsed.rank is not None:
                rank_results.add(parsed.part)
            if parsed.rank in ranks:
                wanted[name] = parsed
        self._check_bytes(sum(self.manifest.files[name].size for name in wanted))
        documents: dict[tuple[str, int | None], bytes] = {}
        tensors: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}

        def read(name: str, parsed: FileName) -> None:
            place = (parsed.part, parsed.rank)
            if parsed.is_json:
                documents[place] = self._read_json(name)
            else:
                found = self._read_tensors(name)
                of_job = parsed.rank is None
                tensors[place] = _shares(found, share_of) if share_of and of_job else found

        with ThreadPoolExecutor(_READERS) as pool:  # copying and digesting run beside one another
            list(pool.map(read, wanted.keys(), wanted.values()))
        for part, files in shards.items():
            if part in rank_results:
                places = [place for place in documents if place[0] == part and place[1] is not None]
            else:
                places = [(part, None)] if None in ranks else []
            for place in places:
                self._add_shards(part, files, share_of, tensors.setdefault(place, {}))
        found: dict[tuple[str, int | None], Any] = {}
        for place in sorted(documents.keys() | tensors.keys(), key=lambda place: place[0]):
            with self._in_file(place[0]):
                found[place] = decode_part(documents.get(place), tensors.get(place), self._limits)
        return found

    def _add_shards(
        self, part: str, files: Sequence[str], share_of: ShareOf | None, to: dict[str, torch.Tensor]
    ) -> None:
        if part not in self._sharded:  # once, however many ranks' states have them
            found = {name: self._shards_in(name) for name in files}
            with self._in_file(part):
                reading = ShardAssembler(chain.from_iterable(found.values()), share_of)
                self._check_bytes(reading.size, max(self.manifest.files[n].size for n in files))
                for name, shards in found.items():
                    if reading.wants(shards):
                        reading.add(shards, self._read_tensors(name))
                self._sharded[part] = reading.tensors()
        if both := sorted(to.keys() & self._sharded[part].keys()):
            raise CheckpointError(
                f"{self.path / part}: the tensor {both[0]!r:.80} is there whole and in shards"
            )
        to.update(self._sharded[part])

    def _shards_in(self, name: str) -> list[SavedShard]:
        """The shards in a file, by its header alone."""
        layout = self.layout(name)
        with self._in_file(name):
            return shards_of(layout)

    def layout(self, name: str) -> FileLayout:
        """Which tensors are in one of its safetensors files, by its header, which is not verified.

        Raises:
            CheckpointError: the file has another size than it was written with, or no such header.
        """
        entry = self.manifest.files[name]
        with self._in_file(name), _closing(self._open_entry(name, entry)) as descriptor:
            begin = os.pread(descriptor, LENGTH_BYTES, 0)
            length = FileLayout.beginning_length(begin, entry.size, self._limits)
            beginning = bytes(buffer_view(_read(descriptor, length)))
            return FileLayout.parse_beginning(beginning, entry.size, self._limits)

    def check_sizes(self) -> None:
        """See whether all files are there, with as many bytes as they were written with.

        Raises:
            CheckpointError: one isn't.
        """
        for name, entry in self.manifest.files.items():
            with self._in_file(name):
                os.close(self._open_entry(name, entry))

    def verify(self) -> None:
        """Compare every file of every rank with its digest.

        Raises:
            CheckpointError: one is not as it was written.
        """
        largest = max((entry.size for entry in self.manifest.files.values()), default=0)
        buffer = memoryview(bytearray(min(largest, _PIECE_BYTES)))
        for name, entry in self.manifest.files.items():
            with self._in_file(name), _closing(self._open_entry(name, entry)) as descriptor:
                digest = new_digest(self.manifest.digest_name)
                rest = entry.size
                while rest:
                    count = os.readv(descriptor, [buffer[: min(rest, _PIECE_BYTES)]])
                    if not count:
                        raise CheckpointError("it was cut short while it was read")
                    digest.update(buffer[:count])
                    rest -= count
                _compare(str(digest.hexdigest()), entry)

    def _read_json(self, name: str) -> bytes:
        entry = self.manifest.files[name]
        if entry.size > self._limits.max_json_bytes:
            raise CheckpointError(
                f"{self.path / name} has {entry.size} bytes; at most "
                f"{self._limits.max_json_bytes} are read (ReadLimits.max_json_bytes)"
            )
        return bytes(buffer_view(self._read_verified(name, entry)))

    def _read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        block = self._read_verified(name, self.manifest.files[name])
        with self._in_file(name):
            layout = FileLayout.parse(buffer_view(block), self._limits)
            data = buffer_view(block)[len(layout.beginning) :]
            found = {place.name: place.of(data) for place in layout.places}
            for place in layout.places:
                if place.dtype is torch.bool and (found[place.name].view(torch.uint8) > 1).any():
                    raise CheckpointError(f"the tensor {place.name!r:.80} is not of truth values")
            return found

    def _read_verified(self, name: str, entry: FileEntry) -> torch.Tensor:
        with self._in_file(name), _closing(self._open_entry(name, entry)) as descriptor:
            block = _read(descriptor, entry.size)
            _compare(digest_of(self.manifest.digest_name, buffer_view(block)), entry)
            return block

    def _open_entry(self, name: str, entry: FileEntry) -> int:
        descriptor = self._folder.open_file(name)
        size = os.fstat(descriptor).st_size
        if size != entry.size:
            os.close(descriptor)
            raise CheckpointError(f"expected {entry.size} bytes, found {size}")
        return descriptor

    def _hold(self) -> None:
        """Keep others from removing the checkpoint, where the file system has such locks."""
        import fcntl  # not on Windows, where the rest of the package can be imported

        assert self._manifest is not None
        try:
            fcntl.flock(self._manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.path} is being removed") from None
        except OSError:
            pass

    def _check_bytes(self, kept: int, passing: int = 0) -> None:
        """Refuse to read what is too much, with what was read before.

        Args:
            kept: how many bytes there will be of it.
            passing: how many more there are meanwhile.
        """
        needed, most = kept + passing, self._limits.max_total_bytes
        if most is not None:
            needed += self._read_bytes
            self._read_bytes += kept
        else:  # what was read before is no longer available
            import psutil  # type: ignore[import-untyped]  # here, since it takes 6 ms

            most = psutil.virtual_memory().available
        if needed > most:
            raise CheckpointError(
                f"{self.path} has {needed} bytes to read; at most {most} are, which is what "
                "memory is available, or ReadLimits.max_total_bytes"
            )

    @contextmanager
    def _in_file(self, name: str) -> Iterator[None]:
        """Errors within say which file they are about."""
        try:
            yield
        except CheckpointError as error:
            if str(self.path) in str(error):
                raise
            raise CheckpointError(f"{self.path / name}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path / name} can't be read: {error.strerror}") from error


def _read(descriptor: int, size: int) -> torch.Tensor:
    """So many bytes of a file, in new memory."""
    block = allocate_buffer(size)
    rest = buffer_view(block)
    while rest.nbytes:
        count = os.readv(descriptor, [rest])
        if not count:
            raise CheckpointError("it was cut short while it was read")
        rest = rest[count:]
        record_heartbeat()
    return block


def _shares(tensors: Mapping[str, torch.Tensor], share_of: ShareOf) -> dict[str, torch.Tensor]:
    return {name: cut(t, share_of(name, tuple(t.shape))) for name, t in tensors.items()}


def _compare(digest: str, entry: FileEntry) -> None:
    if digest != entry.digest:
        raise CheckpointError(f"its digest is {digest}, expected {entry.digest}: it was changed")


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def decode_part(
    document: bytes | None, tensors: dict[str, torch.Tensor] | None, limits: ReadLimits
) -> Any:
    """A part as it was saved, from the contents of its JSON file and its tensors.

    Raises:
        CheckpointError: they are not what was written, or more than ``limits`` allow.
    """
    if document is None:
        return tensors
    try:
        tree = parse_json(document, max_depth=limits.max_json_depth)
        return decode_state(tree, tensors or {})
    except RecursionError:  # the caller lies deep itself
        raise CheckpointError("it is nested too deep to be read here") from None
    except (JsonError, StateError) as error:
        raise CheckpointError(str(error)) from error
