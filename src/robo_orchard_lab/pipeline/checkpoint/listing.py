"""Which checkpoints are in a root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointInfo,
    FileName,
    ReadLimits,
    step_from_name,
)
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.errors import CheckpointError

_Stamp = tuple[int, int, int]


@dataclass(slots=True)
class Listing:
    """What was found, by the manifests; the other files were not looked at."""

    infos: list[CheckpointInfo] = field(default_factory=list)
    """In the order in which they were saved."""
    broken: list[tuple[Path, str]] = field(default_factory=list)
    """What is named like a checkpoint, and why it isn't one, by name."""


class RootListing:
    """Reads a root, each manifest once."""

    def __init__(self, root: Path, limits: ReadLimits) -> None:
        self._root = root
        self._limits = limits
        self._known: dict[str, tuple[_Stamp, CheckpointInfo]] = {}

    def read(self) -> Listing:
        """All that is there now; nothing where there is no such folder.

        Raises:
            CheckpointError: the root can't be read.
        """
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
        self._known = {name: known for name, known in self._known.items() if name in names}
        return found

    def _info(self, name: str) -> CheckpointInfo:
        path = self._root / name
        stamp = _stamp(path / MANIFEST_FILE)
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return known[1]
        info = read_info(path, self._limits)
        if stamp is not None:
            self._known[name] = (stamp, info)
        return info


def read_info(path: Path, limits: ReadLimits) -> CheckpointInfo:
    """What a checkpoint's manifest says, which must say that it is of the step in the name.

    Raises:
        CheckpointError: it can't be trusted.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, expected a folder")
    with OpenCheckpoint(path, limits) as opened:
        check_step(path, opened)
        return opened.manifest.info(path)


def check_step(path: Path, opened: OpenCheckpoint) -> None:
    """Refuse a checkpoint under the name of another step."""
    step = step_from_name(path.name)
    if step is not None and opened.manifest.step != step:
        raise CheckpointError(f"{path} is the checkpoint of step {opened.manifest.step}")


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


# --- contents --------------------------------------------------------------------------------
# What is in a checkpoint, for people: read without a model, and without reading tensors.


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a file of a checkpoint; of one that is divided, a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file of a checkpoint."""

    name: str
    size_bytes: int
    part: str
    rank: int | None
    """The process that wrote it, of what was that one's; None for what is the whole job's."""
    tensors: tuple[SavedTensor, ...] | None
    """None for a file that has none."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint says of itself, and its files."""

    info: CheckpointInfo
    files: tuple[SavedFile, ...]
    progress: Mapping[str, int]
    """The counters of the run; empty for what was not saved by a trainer."""


def read_contents(
    path: str | os.PathLike[str], limits: ReadLimits | None = None, *, tensors: bool = True
) -> Contents:
    """What is in a checkpoint. All files have the sizes that they were written with.

    Args:
        path: its folder.
        limits: of what is read.
        tensors: whether to read which tensors there are.

    Raises:
        CheckpointError: there is none, or it isn't whole.
    """
    with OpenCheckpoint(path, limits or ReadLimits()) as opened:
        opened.check_sizes()
        files = []
        for name, entry in opened.manifest.files.items():
            parsed = FileName.parse(name)
            assert parsed is not None  # or the manifest had been refused
            found = None
            if tensors and not parsed.is_json:
                found = tuple(
                    SavedTensor(place.name, str(place.dtype).removeprefix("torch."), place.shape)
                    for place in opened.layout(name).places
                )
            files.append(SavedFile(name, entry.size, parsed.part, parsed.rank, found))
        return Contents(opened.manifest.info(opened.path), tuple(files), _progress(opened))


def _progress(opened: OpenCheckpoint) -> Mapping[str, Any]:
    if "trainer.json" not in opened.manifest.files:
        return {}
    trainer = opened.load(None, only="trainer").parts["trainer"]
    found = trainer.get("progress") if isinstance(trainer, Mapping) else None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{opened.path} has no counters of a run in its trainer.json")
    return {name: value for name, value in found.items() if name != "version"}
