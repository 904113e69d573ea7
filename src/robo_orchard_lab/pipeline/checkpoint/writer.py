"""Writing one checkpoint's folder, by all ranks together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.info import CheckpointInfo, ReadLimits
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    digest_of,
)
from robo_orchard_lab.pipeline.checkpoint.parts import FileName, PartImages
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.staging_buffer import ImagePool
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.run.durable import (
    flush_folder,
    remove_folder,
    temporary_name,
    write_file,
)

_MAX_STEP = 10**18


class CheckpointImage:
    """All that one rank will write of a checkpoint, in memory of its own."""

    def __init__(
        self,
        step: int,
        parts: Mapping[str, Any],
        of_rank: Mapping[str, Any] | None,
        *,
        ranks: Ranks,
        digest: str,
        pool: ImagePool,
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
        self._images: list[PartImages] = []
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
        of_rank = of_rank or {}
        try:
            first = ranks.index == 0
            if first:
                self.manifest.check_writable(limits)
            images = PartImages(parts, None, pool, limits, ranks=ranks, shards_only=not first)
            self._images.append(images)
            images = PartImages(of_rank, ranks.index, pool, limits, ranks=ranks)
            self._images.append(images)
            if both := sorted(self._sharded_parts() & set(parts) & set(of_rank)):
                raise StateError(
                    f"parts and of_rank both have {both[0]!r}, with sharded tensors; name one "
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
            temporary = folder.parent / ranks.first(what, make)
            files = ranks.each(what, lambda: self.write(temporary))
            return ranks.first(what, lambda: finish(files))
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
