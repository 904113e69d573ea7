"""Files of a run that may leave the machine; no logs, no links, no secrets.

In the repository, the exported model lies at the top, where ``from_pretrained`` looks for it::

    README.md, config.json, *.safetensors     exported model
    config.yaml                               experiment file
    starts/, run_state.json                   command, versions, outcome; no host, no folders
    metrics.jsonl, report.html                metrics; report without host, folders
                                              and events
    checkpoints/step_00000600/                if requested, or if an evaluation needs it
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.shareable_text import find_secret, shareable, shareable_text
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, RUN_STATE, STARTS
from robo_orchard_lab.pipeline.checkpoint.manifest import CHECKPOINTS_FOLDER, MANIFEST_FILE
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.model_card import CARD_FILE, shareable_command
from robo_orchard_lab.pipeline.pretrained_folder import MODEL_FOLDER
from robo_orchard_lab.report.files import (
    Problems,
    inside,
    mapping,
    read_bytes,
    read_object,
    text,
)
from robo_orchard_lab.report.page import REPORT_FILE, embeddable, read_document, to_html
from robo_orchard_lab.report.story import read_configuration

SUFFIXES = (".json", ".jsonl", ".md", ".model", ".safetensors", ".txt", ".yaml", ".yml")
"""Files of a repository that `pull` accepts: data, no code, no pickle and no page."""
_MODEL_SUFFIXES = (".json", ".md", ".model", ".safetensors", ".txt")
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml")
_START = re.compile(r"[0-9]{4,9}\.json")
_OF_START = ("version", "started_at", "processes", "versions", "changes")
_MAX_STARTS = 100
_MAX_TEXT_BYTES = 16 << 20


@dataclass
class SharedFiles:
    """Files to push, by path in the repository.

    Attributes:
        files: Path of a regular file, or contents.
        notes: What the user should know before others read the files.
    """

    files: dict[str, Path | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in sorted(self.files.items())
        }


def shareable_files(folder: Path, model: Path, checkpoints: Sequence[Path] = ()) -> SharedFiles:
    """Collect the files of a run that others may read.

    Args:
        folder: Run folder.
        model: Folder of the exported model.
        checkpoints: Checkpoints to share.

    Raises:
        PipelineConfigError: A file holds a token or a password.
    """
    shared = SharedFiles()
    problems = Problems()
    for name, path in _regular_files(model, shared):
        if name.endswith(_MODEL_SUFFIXES):
            shared.files[name] = path
        else:
            shared.notes.append(f"{path} is not pushed: expected {', '.join(_MODEL_SUFFIXES)}")
    if (config := read_bytes(folder / CONFIG_FILE, problems)) is not None:
        shared.files[CONFIG_FILE] = config
    shared.files |= _starts(folder, problems)
    if state := read_object(folder / RUN_STATE, problems):
        shared.files[RUN_STATE] = _json(_state(state))
    metrics = read_configuration(folder, problems).metrics_file(folder)
    if _is_regular(metrics):
        shared.files[metrics.relative_to(folder).as_posix()] = metrics
    shared.files[REPORT_FILE] = _report(folder)
    for checkpoint in checkpoints:
        for name, path in _regular_files(checkpoint.resolve(), shared):
            shared.files[f"{CHECKPOINTS_FOLDER}/{checkpoint.resolve().name}/{name}"] = path
    _check(shared)
    return shared


def model_folder(folder: Path) -> Path:
    """Return the folder of a run's exported model: that of its `SaveModel`, or the default."""
    document = read_configuration(folder, Problems()).document
    for hook in mapping(document.get("hooks")).values():
        path = mapping(hook).get("folder")
        if text(mapping(hook).get("class_type")).endswith("SaveModel") and isinstance(path, str):
            return inside(folder, path) or folder / MODEL_FOLDER
    return folder / MODEL_FOLDER


def _regular_files(folder: Path, shared: SharedFiles) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each regular file below a folder; no link is followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if _is_regular(path):
                yield path.relative_to(folder).as_posix(), path
            else:
                shared.notes.append(f"{path} is not pushed: it is a link, or no regular file")


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _starts(folder: Path, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Yield the records of starts without host, folders, and names and changes of files."""
    root = folder / STARTS
    names = os.listdir(root) if root.is_dir() and not root.is_symlink() else []
    for name in sorted(filter(_START.fullmatch, names))[-_MAX_STARTS:]:
        start = read_object(root / name, problems)
        if not start:
            continue
        git = mapping(start.get("git"))
        record = {key: shareable(start[key]) for key in _OF_START if key in start}
        record["command"] = shareable_command(str(start.get("command", "")))
        record["git"] = {
            "commit": git.get("commit"),
            "left_out": "names and changes of files" if git.get("changed") else None,
        }
        yield f"{STARTS}/{name}", _json(record)


def _state(state: Mapping[str, Any]) -> Any:
    """Return a run's state without its process, the host, and the text of an error."""
    nowhere = {"pid": 0, "host": "", "started_at": 0.0, "namespace": None}
    return {**shareable(state), "process": nowhere, "error": None}


def _report(folder: Path) -> bytes:
    """Return the report of a run without host, folders, events and names of changed files."""
    title, document = read_document([folder])
    data = json.loads(document)
    for run in data["runs"]:
        # Equal for equal runs, so that a second push changes nothing.
        data["generated_at"] = run["verdict"]["updated_at"] or data["generated_at"]
        run["folder"] = ""
        run["events"] = []
        run["environment"] |= {"folder": "", "host": "", "branch": "", "changed": []}
        command = run["environment"].get("command") or ""
        run["environment"]["command"] = shareable_command(command)
        for start in run["environment"]["starts"]:
            start |= {"host": "", "command": shareable_command(start.get("command") or "")}
    return to_html(shareable_text(title), embeddable(shareable(data))).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _check(shared: SharedFiles) -> None:
    """Refuse secrets, and note home folders, in files that are shared as they are."""
    for name, file in shared.files.items():
        if not name.endswith(_TEXTS) or name.startswith(f"{STARTS}/"):
            continue
        if not isinstance(file, bytes) and file.stat().st_size > _MAX_TEXT_BYTES:
            continue
        data = file if isinstance(file, bytes) else file.read_bytes()
        content = data.decode("utf-8", "replace")
        if (line := find_secret(content)) is not None:
            place = file if isinstance(file, Path) else name
            raise PipelineConfigError(
                f"{place}:{line}: found a token, a password or the value of a secret environment "
                "variable; nothing was pushed; remove it from the file, and revoke it"
            )
        if content != shareable_text(content):
            what = "a checkpoint's command" if name.endswith(MANIFEST_FILE) else name
            if name == CARD_FILE:
                what = "the model card, which was edited"
            note = f"{what} names a home folder"
            if note not in shared.notes:
                shared.notes.append(note)
