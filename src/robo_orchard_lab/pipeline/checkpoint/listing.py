"""Listing of a store's root, and of a checkpoint's contents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.directory import CheckpointFiles
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointInfo,
    FileName,
    ReadLimits,
    step_from_name,
)
from robo_orchard_lab.pipeline.errors import CheckpointError

_Stamp = tuple[int, int, int]


@dataclass(slots=True)
class Listing:
    """Checkpoints of a root, from their manifests alone."""

    infos: list[CheckpointInfo] = field(default_factory=list)
    """Valid checkpoints in the order of their saves."""
    broken: list[tuple[Path, str]] = field(default_factory=list)
    """Paths with a checkpoint's name and no valid manifest, by name, with the reasons."""

    @property
    def to_resume(self) -> list[CheckpointInfo]:
        """Valid checkpoints, the newest healthy one first, and non-finite ones last."""
        return sorted(self.infos, key=lambda i: (not i.poison, i.serial, i.step), reverse=True)


class RootListing:
    """Reader of a root; parses each manifest once."""

    def __init__(self, root: Path, limits: ReadLimits) -> None:
        self._root = root
        self._limits = limits
        self._known: dict[str, tuple[_Stamp, CheckpointInfo]] = {}

    def read(self) -> Listing:
        """List the root, empty if missing; raise CheckpointError if unreadable."""
        found = Listing()
        try:
            names = sorted(os.listdir(self._root))
        except FileNotFoundError:
            return found
        except OSError as error:
            raise CheckpointError(f"{self._root} can't be read: {error.strerror}") from error
        for name in names:
            if step_from_name(name) is not None:
                try:
                    found.infos.append(self._info(name))
                except CheckpointError as error:
                    found.broken.append((self._root / name, str(error)))
        found.infos.sort(key=lambda info: (info.serial, info.step))
        self._known = {name: self._known[name] for name in names if name in self._known}
        return found

    def _info(self, name: str) -> CheckpointInfo:
        path = self._root / name
        stamp = _stamp(path / MANIFEST_FILE)
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return known[1]
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link, expected a directory")
        with CheckpointFiles(path, self._limits) as opened:
            check_step(path, opened.manifest.step)
            info = opened.manifest.info(path)
        if stamp is not None:
            self._known[name] = (stamp, info)
        return info


def check_step(path: Path, step: int) -> None:
    """Refuse a checkpoint of ``step`` whose directory is named for another step."""
    if step_from_name(path.name) not in (None, step):
        raise CheckpointError(f"{path} is the checkpoint of step {step}")


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


# --- contents of one checkpoint --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Tensor, or shard of a tensor, in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedFile:
    """File of a checkpoint."""

    name: str
    size_bytes: int
    part: str
    rank: int | None
    """Rank that wrote the file; None for a file of the job."""
    tensors: tuple[SavedTensor, ...] | None
    """None for a JSON file, and for files without their tensors."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Description of a checkpoint and its files."""

    info: CheckpointInfo
    files: tuple[SavedFile, ...]
    progress: Mapping[str, int]
    """Counters of the run; empty for a checkpoint that no trainer saved."""


def read_contents(
    path: str | os.PathLike[str], limits: ReadLimits | None = None, *, tensors: bool = True
) -> Contents:
    """Describe a checkpoint and optionally its tensors, without reading or verifying these.

    Raises:
        CheckpointError: the checkpoint does not exist, or a file is missing or has another size.
    """
    limits = limits or ReadLimits()
    with CheckpointFiles(path, limits) as opened:
        opened.check_sizes()
        names = {name: FileName.parse(name) for name in opened.manifest.files}
        found = _tensors(opened.path, limits) if tensors else {}
        files = tuple(
            SavedFile(
                name, opened.manifest.files[name].size, parsed.part, parsed.rank, found.get(name)
            )
            for name, parsed in names.items()
            if parsed is not None  # the manifest was checked
        )
        return Contents(opened.manifest.info(opened.path), files, _progress(opened))


def _tensors(path: Path, limits: ReadLimits) -> dict[str, tuple[SavedTensor, ...]]:
    from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint  # imports torch

    with OpenCheckpoint(path, limits) as opened:
        return {
            name: tuple(
                SavedTensor(info.name, str(info.dtype).removeprefix("torch."), info.shape)
                for info in opened.layout(name).tensors
            )
            for name in opened.manifest.files
            if not name.endswith(".json")
        }


def _progress(opened: CheckpointFiles) -> Mapping[str, Any]:
    if "trainer.json" not in opened.manifest.files:
        return {}
    trainer = opened.read_json("trainer.json")
    found = trainer.get("progress") if isinstance(trainer, Mapping) else None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{opened.path} has no counters of a run in its trainer.json")
    return {name: value for name, value in found.items() if name != "version"}
