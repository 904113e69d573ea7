"""Reading a checkpoint's folder, which may be damaged or a stranger's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint.checkpoint_dir import HeldFolder
from robo_orchard_lab.pipeline.checkpoint.info import ReadLimits, SavedState
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    digest_of,
    new_digest,
    parse_manifest,
)
from robo_orchard_lab.pipeline.checkpoint.parts import FileName, decode_part
from robo_orchard_lab.pipeline.checkpoint.safetensors_layout import LENGTH_BYTES, TensorLayout
from robo_orchard_lab.pipeline.checkpoint.shards import (
    Region,
    SavedShard,
    ShareOf,
    TensorShare,
    check_shards,
    cut,
    shards_of,
)
from robo_orchard_lab.pipeline.checkpoint.staging_buffer import bytes_of, new_block
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import CheckpointError

# --- shard reading ---------------------------------------------------------------------------
# Tensors, or a process's shares of them, out of the shards that several processes have saved.


class ShardReading:
    """Takes what is wanted out of one file of shards after the other.

    So it takes the memory of the result and of one file.
    """

    def __init__(self, shards: Iterable[SavedShard], share_of: ShareOf | None) -> None:
        """By what the headers of all files say; nothing is allocated yet.

        Raises:
            CheckpointError: the shards of a tensor do not make it up.
        """
        of_tensor: dict[str, list[SavedShard]] = {}
        for shard in shards:
            of_tensor.setdefault(shard.place.name, []).append(shard)
        self._shares: dict[str, TensorShare | None] = {}
        self._regions: dict[str, Region] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, of_one in of_tensor.items():
            check_shards(name, of_one)
            shape = of_one[0].shape
            share = None if share_of is None else share_of(name, shape)
            self._shares[name] = share
            self._regions[name] = Region.whole(shape) if share is None else share.region
            self._dtypes[name] = of_one[0].place.dtype

    @property
    def size(self) -> int:
        """How many bytes the result takes."""
        return sum(
            region.count * self._dtypes[name].itemsize for name, region in self._regions.items()
        )

    def wants(self, shards: Sequence[SavedShard]) -> bool:
        """Whether something of a file with these shards is needed."""
        return any(self._regions[s.place.name].overlap(s.region) for s in shards)

    def add(self, shards: Sequence[SavedShard], read: Mapping[str, torch.Tensor]) -> None:
        """Take what is needed of a file that was read, and verified.

        Raises:
            CheckpointError: it is another one than the shards are of.
        """
        expected = {s.place.name: (s.place.dtype, s.place.shape) for s in shards}
        if {name: (v.dtype, tuple(v.shape)) for name, v in read.items()} != expected:
            raise CheckpointError("a file of shards was changed while it was read")
        for shard in shards:
            name = shard.place.name
            region = self._regions[name]
            both = region.overlap(shard.region)
            if both is not None:
                part = read[name][shard.region.slices_of(both)]
                self._value(name)[region.slices_of(both)] = part

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was wanted, by name."""
        found = {}
        for name, share in self._shares.items():
            value = self._value(name)
            found[name] = value if share is None else share.make(value)
        return found

    def _value(self, name: str) -> torch.Tensor:
        if name not in self._values:
            self._values[name] = torch.empty(self._regions[name].sizes, dtype=self._dtypes[name])
        return self._values[name]


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
        self._folder = HeldFolder(path, limits)
        self.path = self._folder.path
        self._limits = limits
        self._manifest: int | None = None
        self._sharded: dict[str, dict[str, torch.Tensor]] = {}  # what was read, by part
        self._read_bytes = 0  # of all that was read
        try:
            self._manifest = self._folder.open_file(MANIFEST_FILE, limits.max_manifest_bytes)
            self._hold()
            text = bytes(bytes_of(_read(self._manifest, os.fstat(self._manifest).st_size)))
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
            of_rank={part: value for (part, of), value in found.items() if of is not None},
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
        of_ranks: set[str] = set()  # parts that ranks have for themselves
        for name, parsed in names:
            if parsed is None or only not in (None, parsed.part):
                continue
            if parsed.is_shards:
                shards.setdefault(parsed.part, []).append(name)
                continue
            if parsed.rank is not None:
                of_ranks.add(parsed.part)
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
            if part in of_ranks:
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
                reading = ShardReading(chain.from_iterable(found.values()), share_of)
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

    def layout(self, name: str) -> TensorLayout:
        """Which tensors are in one of its safetensors files, by its header, which is not verified.

        Raises:
            CheckpointError: the file has another size than it was written with, or no such header.
        """
        entry = self.manifest.files[name]
        with self._in_file(name), _closing(self._open_entry(name, entry)) as descriptor:
            begin = os.pread(descriptor, LENGTH_BYTES, 0)
            length = TensorLayout.beginning_length(begin, entry.size, self._limits)
            beginning = bytes(bytes_of(_read(descriptor, length)))
            return TensorLayout.parse_beginning(beginning, entry.size, self._limits)

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
        return bytes(bytes_of(self._read_verified(name, entry)))

    def _read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        block = self._read_verified(name, self.manifest.files[name])
        with self._in_file(name):
            layout = TensorLayout.parse(bytes_of(block), self._limits)
            data = bytes_of(block)[len(layout.beginning) :]
            found = {place.name: place.of(data) for place in layout.places}
            for place in layout.places:
                if place.dtype is torch.bool and (found[place.name].view(torch.uint8) > 1).any():
                    raise CheckpointError(f"the tensor {place.name!r:.80} is not of truth values")
            return found

    def _read_verified(self, name: str, entry: FileEntry) -> torch.Tensor:
        with self._in_file(name), _closing(self._open_entry(name, entry)) as descriptor:
            block = _read(descriptor, entry.size)
            _compare(digest_of(self.manifest.digest_name, bytes_of(block)), entry)
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
    block = new_block(size)
    rest = bytes_of(block)
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
