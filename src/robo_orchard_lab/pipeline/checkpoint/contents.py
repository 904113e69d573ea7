"""What is in a checkpoint, for people: read without a model, and without reading tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.parts import FileName
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.errors import CheckpointError


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
