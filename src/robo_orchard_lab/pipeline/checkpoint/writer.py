"""Writing a checkpoint directory: copy the state to staging buffers, then write on all ranks."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robo_orchard_core.utils.strict_json import json_values
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointInfo,
    FileEntry,
    FileName,
    Manifest,
    ReadLimits,
    check_part_name,
    check_sums,
    digest_of,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.shards import shards_to_write
from robo_orchard_lab.pipeline.checkpoint.state_tree import RESERVED_NAME, encode_state
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    FileLayout,
    StagingBuffer,
    StagingPool,
    has_non_finite,
    max_tensor_count,
    non_finite_names,
)
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.progress import MAX_COUNT
from robo_orchard_lab.pipeline.run.durable import (
    flush_folder,
    remove_folder,
    temporary_name,
    write_file,
)
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, is_sharded

logger = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 16  # of a file whose digest costs less than a switch of threads


class FiniteCheck(NamedTuple):
    """Tensors of a checkpoint that should be finite."""

    covers: Callable[[str], bool]
    """Function of a tensor's part and name, such as ``model/fc.weight``."""
    non_finite: Sequence[str] = ()
    """Names of states outside the checkpoint that are known to be non-finite."""


class StagedCheckpoint:
    """Contents of one rank's files of a checkpoint, copied from the caller's state.

    One staging buffer holds the tensors; :meth:`release` returns the buffer to its pool.
    """

    def __init__(
        self,
        step: int,
        parts: Mapping[str, Any],
        rank_parts: Mapping[str, Any] | None,
        *,
        ranks: Ranks,
        digest: str,
        pool: StagingPool,
        limits: ReadLimits,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        finite: FiniteCheck | None = None,
    ) -> None:
        """Encode the rank's parts and shards; on the first rank also the job's parts."""
        if type(step) is not int or not 0 <= step <= MAX_COUNT:
            raise StateError(
                f"step must be an integer >= 0, got {step!r}; the largest is {MAX_COUNT}"
            )
        self.files: dict[str, bytes | memoryview] = {}
        self._tensors: dict[str, tuple[FileLayout, dict[str, torch.Tensor]]] = {}  # by file
        self._pool = pool
        self._buffer: StagingBuffer | None = None
        self._limits = limits
        self._finite = finite
        self._layouts: dict[str, FileLayout] = {}  # by file
        self.manifest = Manifest(
            step=step,
            serial=0,
            saved_at=datetime.now(UTC),
            ranks=ranks.count,
            digest_name=digest,
            metrics={name: _number(name, value) for name, value in (metrics or {}).items()},
            metadata=dict(metadata or {}),
            files={},
            non_finite=None if finite is None else (),
        )
        rank_parts = rank_parts or {}
        first = ranks.index == 0
        if first:
            self.manifest.check_writable(limits)
        sharded = self._add_parts(parts, None, ranks, shards_only=not first)
        sharded |= self._add_parts(rank_parts, ranks.index, ranks)
        if both := sorted(sharded & set(parts) & set(rank_parts)):
            raise StateError(
                f"parts and rank_parts both have {both[0]!r} with sharded tensors; rename one"
            )

    @property
    def size(self) -> int:
        """Size of this rank's files in bytes."""
        layouts = [layout for layout, _ in self._tensors.values()]
        return sum(layout.size for layout in layouts) + sum(map(len, self.files.values()))

    def _add_parts(
        self, parts: Mapping[str, Any], rank: int | None, ranks: Ranks, *, shards_only: bool = False
    ) -> set[str]:
        """Encode parts of a rank, or None for the job; return the names of parts with shards.

        With ``shards_only``, another process writes the rest.
        """
        with_shards = set()
        documents: list[bytes] = []
        headers: list[FileLayout] = []
        for part, value in parts.items():
            if shards_only:
                document, tensors = None, encode_state(value)[1]
            else:
                document, tensors = _encode_part(
                    part, value, self._limits, of_rank=rank is not None
                )
            sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
            try:
                if sharded:
                    with_shards.add(part)
                    shards, metadata = shards_to_write(sharded, ranks.count)
                    file = FileName(part, ranks.index, is_json=False, is_shards=True)
                    self._add_tensors(str(file), shards, metadata)
                if shards_only:
                    continue
                plain = {name: t for name, t in tensors.items() if name not in sharded}
                headers += self._add_tensors(str(FileName(part, rank, is_json=False)), plain)
            except StateError as error:
                raise StateError(f"the part {part!r}: {error}") from error
            if document is not None:
                self.files[str(FileName(part, rank, is_json=True))] = document
                documents.append(document)
        check_sums(
            StateError,
            self._limits,
            max_json_bytes=sum(map(len, documents)),
            max_json_values=sum(map(json_values, documents)),
            max_header_bytes=sum(len(layout.header) for layout in headers),
            max_tensors=sum(max_tensor_count(layout.header, self._limits) for layout in headers),
        )
        return with_shards

    def _add_tensors(
        self, file: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> list[FileLayout]:
        if not tensors:
            return []
        layout = self._pool.layout(file, tensors, metadata)
        check_sums(
            StateError,
            self._limits,
            max_header_bytes=len(layout.header),
            max_tensors=len(layout.tensors),
        )
        self._tensors[file] = (layout, tensors)
        return [layout]

    def copy(self) -> None:
        """Copy the tensors; the caller may change them afterwards."""
        files = list(self._tensors.values())
        if not files:
            return
        self._buffer = self._pool.acquire([layout for layout, _ in files])
        try:
            self.files.update(zip(self._tensors, self._buffer.fill(files), strict=True))
        except BaseException:
            self.release()
            raise
        self._layouts = {file: layout for file, (layout, _) in self._tensors.items()}
        self._tensors.clear()  # the caller's tensors

    def release(self) -> None:
        """Return the staging buffer to the pool, once no file is read any more."""
        self.files = {}
        if self._buffer is not None:
            self._pool.release(self._buffer)
            self._buffer = None

    def write(self, folder: Path) -> tuple[dict[str, FileEntry], list[str]]:
        """Write and flush this rank's files.

        Returns:
            Sizes and digests of the files, and the names of non-finite tensors.
        """
        written: dict[str, FileEntry] = {}
        non_finite = [] if self._finite is None else list(self._finite.non_finite)
        with ThreadPoolExecutor(1) as pool:  # hides digest and check behind the slower write
            for name, data in self.files.items():
                check = partial(self._check, name, data)
                in_thread = pool.submit(check) if len(data) > _SMALL_BYTES else None
                write_file(folder / name, data)
                digest, found = check() if in_thread is None else in_thread.result()
                written[name] = FileEntry(len(data), digest)
                non_finite += found
        return written, non_finite

    def _check(self, file: str, data: bytes | memoryview) -> tuple[str, list[str]]:
        """Return the digest of a file and the names of its non-finite tensors."""
        return digest_of(self.manifest.digest_name, data), self._non_finite(file, data)

    def _non_finite(self, file: str, data: bytes | memoryview) -> list[str]:
        """Return the names of non-finite tensors in a file, such as ``model/fc.weight``."""
        layout, parsed = self._layouts.get(file), FileName.parse(file)
        if layout is None or parsed is None or self._finite is None:
            return []
        content = memoryview(data)[len(layout.header) :]
        if not has_non_finite(layout, content):
            return []
        tensors = {f"{parsed.part}/{info.name}": info.view(content) for info in layout.tensors}
        return non_finite_names({n: t for n, t in tensors.items() if self._finite.covers(n)})

    def commit(
        self, folder: Path, serial: Callable[[], int], put: Callable[[Path], None], ranks: Ranks
    ) -> CheckpointInfo:
        """Write all ranks' files to a temporary directory, then rename the directory. A collective.

        Everything is on the disk on return.

        Args:
            folder: final directory of the checkpoint.
            serial: makes the folder's parent if it is missing, and returns the checkpoint's
                serial; called on the first rank.
            put: renames the temporary directory to ``folder``; called on the first rank.
            ranks: processes that write.

        Raises:
            CheckpointError: some rank failed; the temporary directory is removed.
        """
        what = f"saving {folder}"
        made: list[Path] = []
        serials: list[int] = []

        def make() -> str:
            serials.append(serial())
            made.append(folder.parent / temporary_name(folder.name))
            made[0].mkdir()
            return made[0].name

        def finish(of_ranks: list[tuple[dict[str, FileEntry], list[str]]]) -> CheckpointInfo:
            files = {name: entry for of_one, _ in of_ranks for name, entry in of_one.items()}
            non_finite = list(dict.fromkeys(name for _, names in of_ranks for name in names))
            manifest = self.manifest.with_files(serials[0], files, non_finite)
            write_file(temporary / MANIFEST_FILE, manifest.check_writable(self._limits))
            flush_folder(temporary)
            put(temporary)
            info = manifest.info(folder)
            if info.poison:
                logger.warning("%s %s; a resume by 'auto' skips it", folder, info.poison)
            return info

        try:
            temporary = folder.parent / ranks.run_on_first(what, make)
            files = ranks.run_on_all(what, lambda: self.write(temporary))
            return ranks.run_on_first(what, lambda: finish(files))
        except BaseException:
            for path in made:
                remove_folder(path)
            raise


class PendingSave:
    """Copied state before its write to the disk; leaving the context discards the copy."""

    def __init__(
        self, staged: StagedCheckpoint, commit: Callable[[StagedCheckpoint], CheckpointInfo]
    ) -> None:
        self._commit = commit
        self._staged: StagedCheckpoint | None = staged
        self._step = staged.manifest.step

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self._step

    def commit(self) -> CheckpointInfo:
        """Write the checkpoint durably, then apply the retention. A collective.

        Any thread may call it, at the same time as other calls to the store. All ranks commit
        several pending saves in the same order.

        Raises:
            CheckpointError: some rank can't write; the previous checkpoint is unchanged.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            raise CheckpointError("this save was committed or discarded already")
        try:
            with _batch_policy():
                return self._commit(staged)
        finally:
            staged.release()

    def discard(self) -> None:
        """Drop the copy, on all ranks or none; no effect after a commit or another discard."""
        if self._staged is not None:
            self._staged.release()
            self._staged = None

    def __enter__(self) -> PendingSave:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


@contextmanager
def _batch_policy() -> Iterator[None]:
    """Schedule this thread for throughput, unless it is the main thread; only on Linux.

    The thread keeps its share of time, and does not interrupt another one, such as a training, when
    the disk answers. A lower priority could starve it while it holds the interpreter lock.
    """
    if sys.platform != "linux" or threading.current_thread() is threading.main_thread():
        yield
        return
    is_set = False
    with suppress(OSError):  # not permitted in a sandbox
        if os.sched_getscheduler(0) == os.SCHED_OTHER:  # 0 is the calling thread
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            is_set = True
    try:
        yield
    finally:
        if is_set:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def put_new(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary directory to a free name, or raise FileExistsError."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; name a new directory")
    os.rename(temporary, folder)
    flush_folder(folder.parent)


def _encode_part(
    part: str, value: Any, limits: ReadLimits, *, of_rank: bool
) -> tuple[bytes | None, dict[str, torch.Tensor]]:
    """Return a part's JSON, or None for a flat mapping of tensors, and its tensors."""
    check_part_name(part)
    # The reader detects by the JSON of a rank's part that shards belong to ranks.
    flat = isinstance(value, Mapping) and value and _is_flat(value)
    if flat and not (of_rank and has_sharded(value.values())):
        return None, {name: tensor.detach() for name, tensor in value.items()}
    try:
        tree, tensors = encode_state(value)
        if _depth(tree) > limits.max_json_depth:
            raise RecursionError
        document = json.dumps(tree, allow_nan=False).encode()
    except RecursionError:
        raise StateError(
            f"the part {part!r} is nested deeper than {limits.max_json_depth}"
        ) from None
    except ValueError as error:  # a StateError, or an int with too many digits
        raise StateError(f"the part {part!r}: {error}") from error
    try:
        check_sums(
            StateError,
            limits,
            max_json_bytes=len(document),
            max_json_values=json_values(document),
        )
    except StateError as error:
        raise StateError(
            f"the part {part!r}: {error}. Save long lists of numbers as tensors"
        ) from None
    return document, tensors


def _depth(tree: Any) -> int:
    """Return how many lists and dicts are nested in one another."""
    depth, values = 0, [tree]
    while containers := [value for value in values if type(value) in (dict, list)]:
        depth += 1
        values = [v for c in containers for v in (c.values() if type(c) is dict else c)]
    return depth


def _is_flat(value: Mapping[Any, Any]) -> bool:
    return all(
        type(name) is str and name != RESERVED_NAME and isinstance(tensor, torch.Tensor)
        for name, tensor in value.items()
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise StateError(f"the metric {name!r} must be a number, got {value!r:.80}")
    return int(value) if isinstance(value, Integral) else float(value)
