"""Which checkpoints are in a root."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo
from robo_orchard_lab.pipeline.checkpoint.folder_names import step_of
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
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
            if step_of(name) is not None:
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
    step = step_of(path.name)
    if step is not None and opened.manifest.step != step:
        raise CheckpointError(f"{path} is the checkpoint of step {opened.manifest.step}")


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
