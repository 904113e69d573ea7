"""Writing one checkpoint's folder, by all ranks together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.strict_json import JsonError, check_json
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    PART_NAME,
    RESERVED_PART,
    CheckpointInfo,
    FileEntry,
    FileName,
    Manifest,
    ReadLimits,
    digest_of,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.shards import shards_to_write
from robo_orchard_lab.pipeline.checkpoint.state import RESERVED_NAME, encode_state
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    FileLayout,
    StagingBuffer,
    StagingPool,
)
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.run.durable import (
    flush_folder,
    remove_folder,
    temporary_name,
    write_file,
)
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, is_sharded


class StagedParts:
    """The files of some parts, as bytes in memory; nothing in them is the caller's.

    Tensors lie in one image, which goes back to its pool with :meth:`release`. Of sharded tensors
    there is what this process has, in a file beside the part's others.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        rank: int | None,
        pool: StagingPool,
        limits: ReadLimits,
        *,
        ranks: Ranks,
        shards_only: bool = False,
    ) -> None:
        """Encode and copy.

        Args:
            parts: by name.
            rank: whose they are; None for those of the whole job.
            pool: where the image comes from.
            limits: of what would be read again.
            ranks: who saves.
            shards_only: whether the rest is another process's to write.

        Raises:
            StateError: a part has a name or a value that can't be saved, or more than the limits
                would let be read; the message names it.
        """
        self.files: dict[str, bytes | memoryview] = {}
        self._pool = pool
        self._image: StagingBuffer | None = None
        found: dict[str, tuple[FileLayout, dict[str, torch.Tensor]]] = {}

        def add(name: FileName, tensors: dict[str, torch.Tensor], about: Any = None) -> None:
            if tensors:
                layout = _layout(name, tensors, about, pool)
                _check_layout(name.part, layout, limits)
                found[str(name)] = (layout, tensors)

        for part, value in parts.items():
            if shards_only:
                document, tensors = None, encode_state(value)[1]
            else:
                document, tensors = _encode_part(part, value, limits, rank_parts=rank is not None)
            sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
            if sharded:
                tensors = {name: t for name, t in tensors.items() if name not in sharded}
                shards, about = _shards(part, sharded, ranks.count)
                add(FileName(part, ranks.index, is_json=False, is_shards=True), shards, about)
            if shards_only:
                continue
            if document is not None:
                self.files[str(FileName(part, rank, is_json=True))] = document
            add(FileName(part, rank, is_json=False), tensors)
        if found:
            self._copy(found)

    def _copy(self, found: dict[str, tuple[FileLayout, dict[str, torch.Tensor]]]) -> None:
        files = list(found.values())
        self._image = self._pool.take([layout for layout, _ in files])
        try:
            self.files.update(zip(found, self._image.fill(files), strict=True))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the memory back; to be called once no file is read any more."""
        self.files = {}
        if self._image is not None:
            self._pool.give_back(self._image)
            self._image = None


def _encode_part(
    part: str, value: Any, limits: ReadLimits, *, rank_parts: bool
) -> tuple[bytes | None, dict[str, torch.Tensor]]:
    """A part's JSON and its tensors. A mapping of nothing but tensors has no JSON, unless it is a
    rank's and has sharded ones: it is by the JSON that their files are known for those of ranks."""
    if not PART_NAME.fullmatch(part) or part == RESERVED_PART:
        raise StateError(
            f"a part can't be named {part!r}: expected up to 64 small letters, digits and "
            f"underscores, other than {RESERVED_PART!r}"
        )
    flat = isinstance(value, Mapping) and value and _is_flat(value)
    if flat and not (rank_parts and has_sharded(value.values())):
        return None, {name: tensor.detach() for name, tensor in value.items()}
    try:
        tree, tensors = encode_state(value)
        check_json(tree, limits.max_json_depth)
        document = json.dumps(tree, allow_nan=False).encode()
    except (JsonError, RecursionError):
        raise StateError(
            f"the part {part!r} is nested deeper than {limits.max_json_depth}"
        ) from None
    except ValueError as error:  # a StateError is one; so is a number with too many digits
        raise StateError(f"the part {part!r}: {error}") from error
    if len(document) > limits.max_json_bytes:
        raise StateError(
            f"the part {part!r} has {len(document)} bytes of JSON; at most {limits.max_json_bytes} "
            "would be read again. Save long lists of numbers as tensors, or raise "
            "ReadLimits.max_json_bytes"
        )
    return document, tensors


def _is_flat(value: Mapping[Any, Any]) -> bool:
    return all(
        type(name) is str and name != RESERVED_NAME and isinstance(tensor, torch.Tensor)
        for name, tensor in value.items()
    )


def _shards(
    part: str, sharded: Mapping[str, torch.Tensor], processes: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        return shards_to_write(sharded, processes)
    except StateError as error:
        raise StateError(f"the part {part!r}: {error}") from error


def _layout(
    name: FileName,
    tensors: dict[str, torch.Tensor],
    about: dict[str, str] | None,
    pool: StagingPool,
) -> FileLayout:
    try:
        return pool.layout(str(name), tensors, about)
    except StateError as error:
        raise StateError(f"the part {name.part!r}: {error}") from error


def _check_layout(part: str, layout: FileLayout, limits: ReadLimits) -> None:
    if len(layout.beginning) > limits.max_header_bytes or len(layout.places) > limits.max_tensors:
        raise StateError(
            f"the part {part!r} has {len(layout.places)} tensors, whose names and shapes take "
            f"{len(layout.beginning)} bytes; at most {limits.max_tensors} and "
            f"{limits.max_header_bytes} would be read again"
        )


_MAX_STEP = 10**18


class StagedCheckpoint:
    """All that one rank will write of a checkpoint, in memory of its own."""

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
    ) -> None:
        """Encode and copy: the first rank what is of the whole job, each rank its own, and what it
        has of sharded tensors.

        Raises:
            StateError: something can't be saved; the message names it.
        """
        if type(step) is not int or not 0 <= step < _MAX_STEP:
            raise StateError(f"step must be a whole number from 0, got {step!r}")
        self._images: list[StagedParts] = []
        self._limits = limits
        self.manifest = Manifest(
            step=step,
            serial=0,
            saved_at=datetime.now(UTC),
            ranks=ranks.count,
            digest_name=digest,
            metrics={name: _number(name, value) for name, value in (metrics or {}).items()},
            metadata=dict(metadata or {}),
            files={},
        )
        rank_parts = rank_parts or {}
        try:
            first = ranks.index == 0
            if first:
                self.manifest.check_writable(limits)
            images = StagedParts(parts, None, pool, limits, ranks=ranks, shards_only=not first)
            self._images.append(images)
            images = StagedParts(rank_parts, ranks.index, pool, limits, ranks=ranks)
            self._images.append(images)
            if both := sorted(self._sharded_parts() & set(parts) & set(rank_parts)):
                raise StateError(
                    f"parts and rank_parts both have {both[0]!r}, with sharded tensors; name one "
                    "otherwise"
                )
        except BaseException:
            self.release()
            raise

    def _sharded_parts(self) -> set[str]:
        names = [FileName.parse(name) for images in self._images for name in images.files]
        return {name.part for name in names if name is not None and name.is_shards}

    def write(self, folder: Path) -> dict[str, FileEntry]:
        """Write this rank's files, flushed, and say what they are."""
        written = {}
        with ThreadPoolExecutor(1) as beside:  # a digest takes a part of the time of writing
            for images in self._images:
                for name, data in images.files.items():
                    digest = beside.submit(digest_of, self.manifest.digest_name, data)
                    write_file(folder / name, data)
                    written[name] = FileEntry(len(data), digest.result())
        return written

    def release(self) -> None:
        """Give the memory back."""
        for images in self._images:
            images.release()
        self._images.clear()

    def commit(
        self, folder: Path, serial: Callable[[], int], put: Callable[[Path], None], ranks: Ranks
    ) -> CheckpointInfo:
        """Write all ranks' files beside ``folder``, then have the first rank put them there.

        A collective. It returns when all of it is on the disk.

        Args:
            folder: where the checkpoint will be.
            serial: gives its number; called on the first rank.
            put: renames the complete temporary folder to ``folder``; called on the first rank.
            ranks: that write it.

        Raises:
            CheckpointError: it failed on some rank; nothing of it is left.
        """
        what = f"saving {folder}"
        made: list[Path] = []

        def make() -> str:
            made.append(folder.parent / temporary_name(folder.name))
            made[0].mkdir()
            return made[0].name

        def finish(files: list[dict[str, FileEntry]]) -> CheckpointInfo:
            all_files = {name: entry for of_one in files for name, entry in of_one.items()}
            manifest = self.manifest.with_files(serial(), all_files)
            manifest.check_writable(self._limits)
            write_file(temporary / MANIFEST_FILE, manifest.to_bytes())
            flush_folder(temporary)
            put(temporary)
            return manifest.info(folder)

        try:
            temporary = folder.parent / ranks.run_on_first(what, make)
            files = ranks.run_on_all(what, lambda: self.write(temporary))
            return ranks.run_on_first(what, lambda: finish(files))
        except BaseException:
            for path in made:
                remove_folder(path)
            raise


def put_new(temporary: Path, folder: Path) -> None:
    """Make a complete temporary folder the checkpoint, where there is nothing yet.

    Raises:
        FileExistsError: there is something by that name; it is left as it is.
    """
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; name a folder that doesn't")
    os.rename(temporary, folder)
    flush_folder(folder.parent)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise StateError(f"the metric {name!r} must be a number, got {value!r:.80}")
    return int(value) if isinstance(value, Integral) else float(value)
