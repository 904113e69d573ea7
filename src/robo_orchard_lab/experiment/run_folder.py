"""Run folders: find the run of a path, and record the starts of a run.

::

    runs/digits/
      config.yaml          complete experiment of the last start
      starts/0001.json     command, versions, host and git state of each start
      starts/0001.diff     uncommitted changes of the repository, for ``git apply``
      run_state.json       state of the run
      checkpoints/         see CheckpointStore
      submissions/0001/    cluster job of the run: settings, status and logs
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.config.errors import ConfigError

CONFIG_FILE = "config.yaml"
STARTS = "starts"
SUBMISSIONS = "submissions"
RUN_STATE = "run_state.json"
_MANIFEST = "manifest.json"
_LEVELS = 3  # a checkpoint lies in RUN/checkpoints/step_00000001
_START = re.compile(r"([0-9]{4,9})\.json")


class NoRunError(ConfigError):
    """A path without a run; the message states the expected path."""


@dataclass(frozen=True, slots=True)
class RunLocation:
    """Run folder of a path, with the checkpoint that the path names, or None."""

    folder: Path
    checkpoint: Path | None = None

    @property
    def config(self) -> Path:
        """Configuration file of the run."""
        return self.folder / CONFIG_FILE


def find_run(path: str | os.PathLike[str]) -> RunLocation:
    """Find the run of a run folder, of its `CONFIG_FILE`, or of a checkpoint inside.

    Raises:
        NoRunError: The path leads to none of these.
    """
    path = Path(path)
    if path.is_file() and path.name in (CONFIG_FILE, _MANIFEST):
        path = path.parent
    is_checkpoint = (path / _MANIFEST).is_file()
    if run_config_file(path) is not None:
        return RunLocation(path)
    for above in [*path.absolute().parents][:_LEVELS] if path.is_dir() else ():
        if run_config_file(above) is not None:
            folder = Path(os.path.relpath(above)) if not path.is_absolute() else above
            return RunLocation(folder, path if is_checkpoint else None)
    expected = (
        f"expected a run folder, its {CONFIG_FILE}, or one of its checkpoints, such as "
        "runs/digits/checkpoints/last"
    )
    if not path.exists():
        raise NoRunError(f"there is no {path}; {expected}")
    if path.is_file():
        raise NoRunError(f"{path} is a file; {expected}")
    if is_checkpoint:
        raise NoRunError(
            f"{path} is a checkpoint, and no folder above it is a run folder with a {CONFIG_FILE}"
        )
    missing = STARTS if (path / CONFIG_FILE).is_file() else CONFIG_FILE
    raise NoRunError(f"{path} is not a run folder: it has no {missing}; {expected}")


def run_config_file(folder: str | os.PathLike[str]) -> Path | None:
    """Return the configuration file of the run in a folder, or None without a run."""
    path = Path(folder) / CONFIG_FILE
    return path if path.is_file() and path.with_name(STARTS).is_dir() else None


def has_only_other_files(folder: str | os.PathLike[str]) -> bool:
    """Return True if a folder holds files and no run.

    Hidden files are ignored: job scripts write some, and a run writes none.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return False
    except OSError:  # a file, or an unreadable folder
        return True
    return bool(names) and not {STARTS, RUN_STATE, SUBMISSIONS}.intersection(names)


def find_escaping_link(folder: str | os.PathLike[str]) -> str | None:
    """Return a link from inside a folder to the outside, or None.

    A run could write through such a link. W&B's own folders contain some and are skipped; hooks
    that write there check their paths.
    """
    root = os.path.realpath(folder)
    for inside, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(inside, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                return path
        folders[:] = [name for name in folders if name != "wandb"]
    return None


def record_start(
    folder: str | os.PathLike[str],
    config: str,
    *,
    processes: int = 1,
    changes: tuple[Mapping[str, Any], ...] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Record the start of a run durably, from one process of the job; return the file.

    The record contains the command line and the configuration, but no environment variables.

    Args:
        folder: Run folder; created if missing.
        config: Complete configuration as YAML.
        processes: World size.
        changes: Differences from the previous configuration, as plain data.
        provenance: Origins of values and differences from the base file, as plain data.

    Raises:
        OSError: The record can't be written.
    """
    from robo_orchard_lab.pipeline.run.durable import flush_folder, make_folder, write_file
    from robo_orchard_lab.pipeline.run.durable import replace_file as replace
    from robo_orchard_lab.pipeline.run.run_info import git_state, versions

    folder = Path(folder)
    make_folder(folder / STARTS)
    state = git_state(Path.cwd())
    names = os.listdir(folder / STARTS)
    numbers = [int(found[1]) for name in names if (found := _START.fullmatch(name))]
    number = max(numbers, default=0) + 1
    while (path := folder / STARTS / f"{number:04d}.json").exists():  # a name of too many digits
        number += 1
    record: dict[str, Any] = {
        "version": 1,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "processes": processes,
        "versions": versions(),
        "git": None,
        "changes": [*changes],
        **(provenance or {}),
    }
    if state is not None:
        diff = path.with_suffix(".diff")
        if state.diff is not None:
            replace(diff, state.diff)
        record["git"] = {
            "commit": state.commit,
            "branch": state.branch,
            "changed": [*state.changed],
            "diff": None if state.diff is None else diff.name,
            "left_out": state.left_out,
        }
    write_file(path, json.dumps(record, indent=2).encode() + b"\n")
    flush_folder(path.parent)
    replace(folder / CONFIG_FILE, config.encode())
    return path
