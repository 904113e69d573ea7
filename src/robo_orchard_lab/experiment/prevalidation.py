"""What is refused of an experiment's document ahead of the first import.

Nothing here looks at code: names are compared with names, paths with the folder one is in. What
needs the code (fields of parts, kinds, types) is refused when the document is validated.
"""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path as FilePath
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    Path,
    TrustError,
    describe,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import Plain, check_plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_core.utils.config.references import split_reference
from robo_orchard_lab.experiment.catalogue import DEFINITIONS, kind_of, nearest
from robo_orchard_lab.experiment.document import ExperimentDocument, check_bounds
from robo_orchard_lab.experiment.overrides import NAMED_ENTRIES, origin_of, walk
from robo_orchard_lab.experiment.run_folder import find_escaping_link, has_only_other_files

MAX_REFERENCE = 300
"""Characters of a name of code."""


@dataclass(frozen=True)
class TopField:
    """What a document holds at its top.

    Attributes:
        kind: A mapping, or anything else, which validation looks at.
        required: Whether it has to be there.
        nullable: Whether a mapping may be null.
    """

    kind: Literal["mapping", "value"] = "mapping"
    required: bool = False
    nullable: bool = False


TOP_FIELDS = {
    "name": TopField("value"),
    "seed": TopField("value"),
    "run_folder": TopField("value"),
    "model": TopField(required=True, nullable=True),
    "data": TopField(required=True),
    "batch_processor": TopField(required=True, nullable=True),
    "optimizer": TopField(nullable=True),
    "lr_scheduler": TopField(nullable=True),
    "hooks": TopField(),
    "trainer": TopField(required=True),
    "accelerator": TopField(),
    "checkpoint": TopField(nullable=True),
    "resume": TopField("value"),
}
"""The fields of ``ExperimentConfig``."""

_MAX_FOLDER = 255  # bytes of a folder's name, in the file systems that are in use

_FUNCTION_KEYS = ("collate_fn", "worker_init_fn")  # of loaders; elsewhere such a key may hold text

_PLACES = (
    (("model",), "module"),
    (("batch_processor",), "batch processor"),
    (("optimizer",), "optimizer"),
    (("lr_scheduler",), "lr_scheduler"),
    (("hooks", "*"), "hook"),
    (("data", "train", "sampler"), "sampler"),
    (("data", "train", "batch_sampler"), "sampler"),
)
"""Where what is known of the catalogue is wanted; much more than a dataset can be iterated."""

_LISTED_TOPS = {name.partition(".")[0] for name in DEFINITIONS}

_NEEDED: dict[Path, frozenset[str]] = {
    ("hooks",): frozenset(PART_KEYS),
    ("data", "evaluation"): frozenset({"dataset"}),
    ("optimizer", "groups"): frozenset({"parameters"}),
}
"""Keys of which every entry that has a name has one."""

_COMPARED = 200  # entries, with one that may be misspelt

_TRACKER_SINKS = {
    f"robo_orchard_lab.pipeline.sinks.trackers:{name}"
    for name in ("TrackerSink", "TrackerSinkConfig")
}


def prevalidate(document: ExperimentDocument, trust: Trust) -> None:
    """Refuse what can be refused without importing anything.

    Args:
        document: As it was read.
        trust: Whose code it may name; `ExperimentTrust` makes it.

    Raises:
        ConfigError: Of the kind that says what is wrong, with the place, and the file and line,
            the option or the variable that it comes from.
    """
    fields = document.document
    try:
        check_plain(fields)
        check_bounds(fields)
        _check_top(fields)
        for path, value in walk(fields):
            if path and not str(path[-1]).isprintable():
                # Of hooks, sets and metrics, they are told in logs.
                raise ConfigFieldError("expected a key that can be printed", path)
            if path in NAMED_ENTRIES:
                _check_named_entries(path, value)
            if _is_reference(path, value):
                _check_reference(path, value, trust)
            if isinstance(value, dict):
                _check_kind(path, value)
                _check_trackers(path, value, trust)
        _check_run_folder(document)
    except ConfigError as error:
        raise document.locate(error) from None


def _check_top(fields: dict[str, Plain]) -> None:
    for name, value in fields.items():
        if name == "trust":
            raise ConfigFieldError(
                "no file says whom to trust; say --trust, or trust in your own pyproject.toml",
                (name,),
            )
        if name not in TOP_FIELDS:
            raise unknown_field(name, TOP_FIELDS, "an experiment")
        field = TOP_FIELDS[name]
        is_mapping = isinstance(value, dict) or (value is None and field.nullable)
        if field.kind == "mapping" and not is_mapping:
            raise ConfigFieldError(f"expected a mapping, found {describe(value)}", (name,))
    for name, field in TOP_FIELDS.items():
        if field.required and name not in fields:
            raise ConfigFieldError("a value is required here and none is given", (name,))


def _check_named_entries(path: Path, value: Plain) -> None:
    if value is not None and not isinstance(value, dict):
        raise ConfigFieldError(f"expected a mapping of names, found {describe(value)}", path)
    lacking: str | None = None
    for name, entry in (value or {}).items():
        if not isinstance(entry, dict):
            raise ConfigFieldError(f"expected a mapping, found {describe(entry)}", (*path, name))
        if lacking is None and _NEEDED[path].isdisjoint(entry):
            lacking = name
    # A name that is misspelt, where one of its fields is said, would be that of a new entry. The
    # first is looked at, which is refused at any rate: to compare thousands takes a minute.
    if lacking is not None:
        others = [name for name in islice(value or {}, _COMPARED) if name != lacking]
        if near := difflib.get_close_matches(lacking, others, 1):
            problem = f"there is none of this name; did you mean {near[0]!r}?"
            raise ConfigFieldError(problem, (*path, lacking))


def _is_reference(path: Path, value: Plain) -> bool:
    """Whether it names code; functions may stand alone, as in ``collate_fn: my_data:collate``."""
    key = path[-1] if path else ""
    return key in PART_KEYS or (key in _FUNCTION_KEYS and isinstance(value, str))


def _check_reference(path: Path, reference: Plain, trust: Trust) -> None:
    if not isinstance(reference, str):
        problem = f"expected a name like 'package.module:Name', found {describe(reference)}"
        raise ConfigReferenceError(problem, path)
    if len(reference) > MAX_REFERENCE:
        raise ConfigReferenceError(f"expected a name, found {len(reference)} characters", path)
    try:
        module, qualname = split_reference(reference)
    except ConfigReferenceError as error:
        if near := nearest(reference):
            error.problem += f"; did you mean {near!r}?"
        raise error.under(path) from None
    if not trust.covers(module, qualname):
        raise TrustError(f"{reference!r} is not trusted{_advice(reference, module)}", path)
    if any(name.startswith("__") for name in (*module.split("."), *qualname.split("."))):
        # To import a __main__ is to run a command.
        raise ConfigReferenceError(f"{reference!r} is nothing that a document names", path)


def _advice(reference: str, module: str) -> str:
    """What to do about code that isn't trusted; of Python's own, no experiment needs any."""
    if near := nearest(reference):
        return f"; did you mean {near!r}?"
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "__main__":
        return ""
    # Of a package that is listed in part, the rest was left out for a reason.
    return f"; if you trust its code, say --trust {reference if top in _LISTED_TOPS else top}"


def _check_kind(path: Path, part: dict[str, Plain]) -> None:
    """That what the catalogue has is not named where it can't stand; of others nobody knows yet."""
    wanted = next((kind for place, kind in _PLACES if _is_at(path, place)), None)
    for key in PART_KEYS if wanted else ():
        name = part.get(key)
        kind = kind_of(name) if isinstance(name, str) else None
        is_called = key == "func" and wanted == "batch processor"
        if kind not in (None, wanted) and not is_called:
            article = "an" if wanted == "optimizer" else "a"
            problem = f"expected {article} {wanted}, found {name!r}, which is for another place"
            raise ConfigReferenceError(problem, (*path, key))


def _is_at(path: Path, place: tuple[str, ...]) -> bool:
    return len(path) == len(place) and all(
        key in ("*", part) for part, key in zip(path, place, strict=True)
    )


def _check_trackers(path: Path, sink: dict[str, Plain], trust: Trust) -> None:
    """That trackers are trusted: packages that send what they get to somebody."""
    if _TRACKER_SINKS.isdisjoint(str(sink.get(key)) for key in PART_KEYS):
        return
    trackers = sink.get("trackers")
    for index, name in enumerate(trackers if isinstance(trackers, list) else ()):
        is_known = name == "tensorboard" or not isinstance(name, str)  # or refused by validation
        if not is_known and not trust.covers(str(name), ""):
            raise TrustError(
                f"the tracker {describe(name)} is not trusted; if it may see what the run logs, "
                f"say --trust {name}",
                (*path, "trackers", index),
            )


def _check_run_folder(document: ExperimentDocument) -> None:
    """That no file has its run write elsewhere than below the current folder."""
    field = "name" if document.document.get("run_folder") is None else "run_folder"
    value = document.document.get(field)
    if not isinstance(value, str) or origin_of((field,), document.leaf_origins).layer != "file":
        return
    folder = FilePath("runs", value) if field == "name" else FilePath(value)
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(folder)
        leads_out = path.drive or path.root or not path.parts
        # Hidden ones, as .. is, are those of programs, which read what they find there.
        is_hidden = any(part.startswith(".") for part in path.parts)
        if leads_out or is_hidden or not value.isprintable():
            raise ConfigFieldError(
                "a file can only have its run in a folder below the current one, with no name that "
                f"begins with a dot; found {describe(value)}; say --run_folder for any other",
                (field,),
            )
    if any(len(part.encode()) > _MAX_FOLDER for part in folder.parts):
        raise ConfigFieldError(f"expected names of at most {_MAX_FOLDER} bytes", (field,))
    for link in (folder, *folder.parents):
        if os.path.islink(link):
            problem = f"a file can't have its run behind the link {str(link)!r}; say --run_folder"
            raise ConfigFieldError(problem, (field,))
    if has_only_other_files(folder):
        raise ConfigFieldError(
            f"a file can't have its run among other files, as there are in {str(folder)!r}; say "
            "--run_folder",
            (field,),
        )
    if (out := find_escaping_link(folder)) is not None:
        raise ConfigFieldError(
            f"a file can't have its run where the link {out!r} leads out; remove the link, or say "
            "--run_folder",
            (field,),
        )
