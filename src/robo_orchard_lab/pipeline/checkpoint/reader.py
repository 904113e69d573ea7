"""Reading a checkpoint directory, possibly damaged or untrusted.

:class:`OpenCheckpoint` verifies and decodes the files. Every size is checked before memory is
allocated, and every digest before a file is decoded. Verifying runs the same code, without keeping
the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.strict_json import JsonError, json_values, parse_json
from robo_orchard_lab.pipeline.checkpoint.directory import (
    CheckpointDir,
    CheckpointFiles,
    check_digest,
    closing_file,
    data_and_holes,
    refuse_sparse,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    FileName,
    ReadLimits,
    SavedState,
    check_sums,
    digest_of,
    new_digest,
)
from robo_orchard_lab.pipeline.checkpoint.shards import (
    SavedShard,
    ShardAssembler,
    ShareOf,
    cut,
    shards_of,
)
from robo_orchard_lab.pipeline.checkpoint.state_tree import decode_state
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    LENGTH_BYTES,
    FileLayout,
    allocate_buffer,
    buffer_view,
    max_tensor_count,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError

_PIECE_BYTES = 1 << 26
_READERS = 2
_JSON_MEMORY = 12  # bytes of memory for a byte of JSON, at most


class OpenCheckpoint(CheckpointFiles):
    """Open checkpoint, protected from removal, whose files are verified and decoded."""

    def __init__(self, path: str | os.PathLike[str], limits: ReadLimits) -> None:
        """Open the directory and verify its manifest.

        Raises:
            CheckpointError: the checkpoint does not exist or can't be trusted.
        """
        super().__init__(path, limits)
        self._sharded: dict[str, dict[str, torch.Tensor]] = {}  # assembled tensors by part
        self._files: dict[int | None, dict[str, FileName]] = {}  # by rank; None for the job
        self._shard_files: dict[str, list[str]] = {}  # by part
        self._parts_of_ranks: set[str] = set()
        self._headers: dict[str, tuple[int, int]] = {}  # size and tensors by file
        self._read_bytes = 0
        for name in self.manifest.files:
            parsed = FileName.parse(name)
            assert parsed is not None  # the manifest was checked
            if parsed.is_shards:
                self._shard_files.setdefault(parsed.part, []).append(name)
                continue
            self._files.setdefault(parsed.rank, {})[name] = parsed
            if parsed.rank is not None:
                self._parts_of_ranks.add(parsed.part)

    def load(
        self, rank: int | None, share_of: ShareOf | None = None, only: str | None = None
    ) -> SavedState:
        """Load the parts of the job and of one rank.

        Args:
            rank: loading rank; None loads only the parts of the job.
            share_of: selects the share of job tensors and of sharded tensors; by default complete
                tensors. Unsharded tensors of a rank are always complete.
            only: the one part to load; by default all.

        Raises:
            CheckpointError: a file was changed.
        """
        wanted = (None,) if rank is None else (None, self.saved_rank(rank))
        found = self._parts_of(*wanted, share_of=share_of, only=only)
        return SavedState(
            parts={part: value for (part, of), value in found.items() if of is None},
            rank_parts={part: value for (part, of), value in found.items() if of is not None},
            info=self.manifest.info(self.path),
        )

    def saved_rank(self, rank: int) -> int:
        """Return the saved rank for ``rank`` to resume: ``rank`` itself, or the last saved rank."""
        return min(rank, self.manifest.ranks - 1)

    def all_rank_parts(self, share_of: ShareOf | None = None) -> Iterator[Mapping[str, Any]]:
        """Load the parts of each saved rank, rank by rank.

        Args:
            share_of: see :meth:`load`.

        Raises:
            CheckpointError: a file was changed, or a rank has no files.
        """
        for rank in range(self.manifest.ranks):
            if rank not in self._files:
                raise CheckpointError(
                    f"{self.path} has no files of rank {rank}; it was saved by "
                    f"{self.manifest.ranks} ranks"
                )
            found = self._parts_of(rank, share_of=share_of)
            yield {part: value for (part, _), value in found.items()}

    def _parts_of(
        self,
        *ranks: int | None,
        share_of: ShareOf | None = None,
        only: str | None = None,
        values: bool = True,
    ) -> dict[tuple[str, int | None], Any]:
        """Load parts by name and rank; rank None stands for the job.

        Without ``values``, verify the files in pieces of memory, and return meta tensors.
        """
        wanted: dict[str, FileName] = {}
        for rank in ranks:
            of_one = {
                name: parsed
                for name, parsed in self._files.get(rank, {}).items()
                if only in (None, parsed.part)
            }
            self._check_sums(of_one)
            wanted |= of_one
        if values:
            self._check_memory(wanted)
        documents: dict[tuple[str, int | None], bytes] = {}
        tensors: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}

        def read(name: str, parsed: FileName) -> None:
            key = (parsed.part, parsed.rank)
            if parsed.is_json:
                documents[key] = bytes(buffer_view(self._read_verified(name)))
                return
            if not values:
                tensors[key] = self._verify_tensors(name)
                return
            found = self._read_tensors(name)
            if share_of is not None and parsed.rank is None:
                found = {n: cut(t, share_of(n, tuple(t.shape))) for n, t in found.items()}
            tensors[key] = found

        # One thread reads while one computes digests.
        with ThreadPoolExecutor(_READERS if values else 1) as pool:
            list(pool.map(read, wanted.keys(), wanted.values()))
        for rank in ranks:
            texts = [text for (_, of), text in documents.items() if of == rank]
            with self._in_file(""):
                check_sums(
                    CheckpointError, self._limits, max_json_values=sum(map(json_values, texts))
                )
        for part, files in self._shard_files.items():
            if only not in (None, part):
                continue
            if part in self._parts_of_ranks:
                keys = [key for key in documents if key[0] == part and key[1] is not None]
            else:
                keys = [(part, None)] if None in ranks else []
            for key in keys:
                self._add_shards(part, files, share_of, tensors.setdefault(key, {}), values)
        found: dict[tuple[str, int | None], Any] = {}
        for key in sorted(documents.keys() | tensors.keys(), key=lambda key: key[0]):
            with self._in_file(str(FileName(*key, is_json=True))):
                found[key] = _decode_part(documents.pop(key, None), tensors.get(key), self._limits)
        return found

    def _add_shards(
        self,
        part: str,
        files: Sequence[str],
        share_of: ShareOf | None,
        to: dict[str, torch.Tensor],
        values: bool,
    ) -> None:
        if part not in self._sharded:  # once for all ranks
            found: dict[str, list[SavedShard]] = {}
            count = sum(self._header(name)[1] for name in files) // 2  # also in _INFO of the header
            if count > self._limits.max_shards:
                raise CheckpointError(
                    f"{self.path / part} has {count} shards; at most {self._limits.max_shards} "
                    "are read"
                )
            for name in files:
                with self._in_file(name):
                    found[name] = shards_of(self.layout(name))
            with self._in_file(part):
                assembler = ShardAssembler(chain.from_iterable(found.values()), share_of)
                if values or self._limits.max_total_bytes is not None:
                    largest = max(self.manifest.files[name].size for name in files)
                    self._check_memory((), assembler.size, largest)
                for name, shards in found.items():
                    if not values:
                        self._verify_tensors(name)
                    elif assembler.needs(shards):
                        assembler.add(shards, self._read_tensors(name))
                self._sharded[part] = assembler.tensors(values)
        if both := sorted(to.keys() & self._sharded[part].keys()):
            raise CheckpointError(
                f"{self.path / part}: the tensor {both[0]!r:.80} is saved complete and in shards"
            )
        to.update(self._sharded[part])

    def layout(self, name: str) -> FileLayout:
        """Read the header of a safetensors file, without verifying the file.

        Raises:
            CheckpointError: the size differs from the manifest, or the header is invalid.
        """
        entry = self.manifest.files[name]
        with self._in_file(name):
            return FileLayout.parse(self._read_header(name), entry.size, self._limits)

    def _read_header(self, name: str) -> memoryview:
        entry = self.manifest.files[name]
        with self._in_file(name), closing_file(self._open_entry(name, entry)) as descriptor:
            begin = os.pread(descriptor, LENGTH_BYTES, 0)
            length = FileLayout.header_length(begin, entry.size, self._limits)
            return buffer_view(_read(descriptor, length))

    def _header(self, name: str) -> tuple[int, int]:
        """Return the size of a file's header and an upper bound of its tensors, unparsed."""
        if name not in self._headers:
            header = self._read_header(name)
            with self._in_file(name):
                self._headers[name] = len(header), max_tensor_count(header, self._limits)
        return self._headers[name]

    def _check_sums(self, names: Mapping[str, FileName]) -> None:
        """Refuse the files of one rank, or of the job, before reading them if the sum is large."""
        sums = dict.fromkeys(("max_json_bytes", "max_header_bytes", "max_tensors"), 0)
        for name, file in names.items():
            if file.is_json:
                sums["max_json_bytes"] += self.manifest.files[name].size
            else:
                size, count = self._header(name)
                sums["max_header_bytes"] += size
                sums["max_tensors"] += count
            with self._in_file(name):
                check_sums(CheckpointError, self._limits, **sums)

    def verify(self) -> None:
        """Run all checks of a load, for all ranks, in pieces of memory.

        Raises:
            CheckpointError: a file was changed, or can't be loaded.
        """
        for rank in {None: 0, **self._files}:
            if self._limits.max_total_bytes is not None:
                self._read_bytes = 0  # a load reads the job's files and those of one rank
                self._check_memory({**self._files.get(None, {}), **self._files.get(rank, {})})
            self._parts_of(rank, values=False)

    def _read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        file = buffer_view(self._read_verified(name))
        with self._in_file(name):
            return _tensors_in(file, self._limits)

    def _verify_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Compare a file with its digest, in pieces; return its tensors without values."""
        entry, layout = self.manifest.files[name], self.layout(name)
        buffer = allocate_buffer(min(entry.size, _PIECE_BYTES))
        with self._in_file(name), closing_file(self._open_entry(name, entry)) as descriptor:
            digest = new_digest(self.manifest.digest_name)
            bools = sorted(
                (t.begin, t.end, t.name) for t in layout.tensors if t.dtype is torch.bool
            )
            begin = -len(layout.header)
            while begin + len(layout.header) < entry.size:
                piece = buffer_view(buffer)[: entry.size - len(layout.header) - begin]
                count = os.readv(descriptor, [piece])
                if not count:
                    raise CheckpointError("it was truncated while it was read")
                digest.update(piece[:count])
                while bools and bools[0][0] < begin + count:
                    first, end, key = bools[0]
                    _check_bools(key, buffer[max(first - begin, 0) : min(end - begin, count)])
                    if end > begin + count:
                        break
                    bools.pop(0)
                begin += count
                record_heartbeat()
            check_digest(str(digest.hexdigest()), entry)
        return {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in layout.tensors}

    def _read_verified(self, name: str) -> torch.Tensor:
        entry = self.manifest.files[name]
        with self._in_file(name), closing_file(self._open_entry(name, entry)) as descriptor:
            buffer = _read(descriptor, entry.size)
            check_digest(digest_of(self.manifest.digest_name, buffer_view(buffer)), entry)
            return buffer

    def _check_memory(self, names: Iterable[str], kept: int = 0, temporary: int = 0) -> None:
        """Refuse to read more bytes than allowed, counting earlier reads.

        Args:
            names: files to read.
            kept: size of other results in bytes.
            temporary: additional bytes while reading.
        """
        sizes = {name: self.manifest.files[name].size for name in names}
        kept += sum(sizes.values())
        needed, most = kept + temporary, self._limits.max_total_bytes
        if most is not None:
            needed += self._read_bytes
            self._read_bytes += kept
        else:  # earlier reads have reduced the available memory
            of_json = sum(size for name, size in sizes.items() if name.endswith(".json"))
            needed += of_json * (_JSON_MEMORY - 1)
            most = _available_memory()
        if needed > most:
            raise CheckpointError(
                f"{self.path} has {needed} bytes to read; at most {most} are, the available memory "
                "or ReadLimits.max_total_bytes"
            )


def read_tensor_file(
    path: str | os.PathLike[str], limits: ReadLimits | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """Read a safetensors file of any program to the CPU, with the checks of a checkpoint's file.

    The path may be a link.

    Returns:
        The tensors by name, and the file's xxh3-128 digest.

    Raises:
        CheckpointError: the file can't be read, is malformed, larger than the available memory or
            than ``limits``, sparse, or belongs to an untrusted owner.
    """
    limits = limits or ReadLimits()
    path = Path(path).resolve()
    folder = CheckpointDir(path.parent, limits)
    most = limits.max_total_bytes
    with closing(folder), closing_file(folder.open_file(path.name)) as descriptor:
        try:
            size = os.fstat(descriptor).st_size
            begin = os.pread(descriptor, LENGTH_BYTES, 0)
            header = os.pread(descriptor, FileLayout.header_length(begin, size, limits), 0)
            FileLayout.parse(memoryview(header), size, limits)
            if size > (most := _available_memory() if most is None else most):
                raise CheckpointError(f"it has {size} bytes; at most {most} are read")
            data, holes = data_and_holes(descriptor, size)
            refuse_sparse(size, data, holes)
            file = buffer_view(_read(descriptor, size))
            return _tensors_in(file, limits), digest_of("xxh3_128", file)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _tensors_in(file: memoryview, limits: ReadLimits) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file in memory, as views."""
    layout = FileLayout.parse(file, len(file), limits)
    data = file[len(layout.header) :]
    found = {info.name: info.view(data) for info in layout.tensors}
    for key, tensor in found.items():
        if tensor.dtype is torch.bool:
            _check_bools(key, tensor.view(torch.uint8))
    return found


def _available_memory() -> int:
    import psutil  # type: ignore[import-untyped]  # here, since it costs 6 ms

    available: int = psutil.virtual_memory().available
    return available


def _decode_part(
    document: bytes | None, tensors: dict[str, torch.Tensor] | None, limits: ReadLimits
) -> Any:
    if document is None:
        return tensors
    try:
        tree = parse_json(document, max_depth=limits.max_json_depth)
        return decode_state(tree, tensors or {})
    except RecursionError:  # the call stack was deep before
        raise CheckpointError("it is nested too deep to be read here") from None
    except (JsonError, StateError) as error:
        raise CheckpointError(str(error)) from error


def _read(descriptor: int, size: int) -> torch.Tensor:
    """Read ``size`` bytes into a new buffer."""
    buffer = allocate_buffer(size)
    rest = buffer_view(buffer)
    while rest.nbytes:
        count = os.readv(descriptor, [rest])
        if not count:
            raise CheckpointError("it was truncated while it was read")
        rest = rest[count:]
        record_heartbeat()
    return buffer


def _check_bools(name: str, content: torch.Tensor) -> None:
    if (content > 1).any():
        raise CheckpointError(f"the bool tensor {name!r:.80} has bytes above 1")
