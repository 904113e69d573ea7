"""Checks of an experiment's document before anything is imported.

Only names and paths are compared here. Fields of parts, kinds and types require the code; they
are checked when the document is validated.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path as FilePath
from pathlib import PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Literal, get_origin

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    MAX_PROBLEMS,
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
from robo_orchard_core.utils.config.references import split_reference, union_members
from robo_orchard_lab.experiment.catalogue import DEFINITIONS, kind_of, suggest
from robo_orchard_lab.experiment.document import ExperimentDocument, check_bounds
from robo_orchard_lab.experiment.overrides import NAMED_ENTRIES, origin_of, walk
from robo_orchard_lab.experiment.parts import ExperimentFields
from robo_orchard_lab.experiment.run_folder import find_escaping_link, has_only_other_files

MAX_REFERENCE = 300
"""Maximum length of a reference to code, in characters."""

RENAMED_FIELDS: dict[Path, str] = {
    ("schedule",): "lr_scheduler",
    ("trainer", "schedule_every"): "lr_scheduler.every",
}
"""Current names of fields by their former paths."""

_MAX_FOLDER_NAME = 255  # bytes of one name, in common file systems

_FUNCTION_KEYS = ("collate_fn", "worker_init_fn")  # of loaders; elsewhere such a key may hold text

_KINDS_BY_PATH = {
    ("model",): "module",
    ("batch_processor",): "batch processor",
    ("optimizer",): "optimizer",
    ("lr_scheduler",): "LR scheduler",
    ("hooks", "*"): "hook",
    ("data", "train", "sampler"): "sampler",
    ("data", "train", "batch_sampler"): "sampler",
}
"""Required kinds of catalogued code; datasets are missing since any iterable may be one."""

_CATALOGUED_PACKAGES = {name.partition(".")[0] for name in DEFINITIONS}

_REQUIRED_KEYS: dict[Path, frozenset[str]] = {
    ("hooks",): frozenset(PART_KEYS),
    ("data", "evaluation"): frozenset({"dataset"}),
    ("optimizer", "groups"): frozenset({"parameters"}),
}
"""Keys of which each named entry must have one."""

_MAX_COMPARED = 200  # names compared with a misspelled one

_TRACKER_SINKS = {
    f"robo_orchard_lab.pipeline.sinks.trackers:{name}"
    for name in ("TrackerSink", "TrackerSinkConfig")
}


def prevalidate(document: ExperimentDocument, trust: Trust) -> None:
    """Refuse an invalid or untrusted document, without importing anything.

    Args:
        document: Result of `read_experiment`.
        trust: Code that the document may name; `ExperimentTrust` makes it.

    Raises:
        ConfigError: The error has the path and the file and line, option or variable, and the
            further errors of the document.
    """
    fields = document.document
    try:
        check_plain(fields)
        check_bounds(fields)
    except ConfigError as error:
        raise document.locate(error) from None
    found: dict[Path, ConfigError] = {}
    for check in _checks(document, trust):
        try:
            check()
        except ConfigError as error:
            found.setdefault(error.path, document.locate(error))
            if len(found) == MAX_PROBLEMS:
                break
    if found:
        first, *others = found.values()
        first.others = tuple(others)
        raise first from None


def _checks(document: ExperimentDocument, trust: Trust) -> Iterator[Callable[[], None]]:
    """Yield checks of a document, each of which raises a `ConfigError`."""
    fields = document.document
    yield partial(check_renamed_fields, fields)
    declared = ExperimentFields.model_fields
    for name in dict.fromkeys([*fields, *declared]):
        yield partial(_check_field, name, fields)
    for path, value in walk(fields):
        if path and not str(path[-1]).isprintable():
            yield partial(_refuse_key, path)
        if path in NAMED_ENTRIES:
            yield partial(_check_named_entries, path, value)
        if _is_reference(path, value):
            yield partial(_check_reference, path, value, trust)
        if isinstance(value, dict):
            yield partial(_check_kind, path, value)
            yield partial(_check_trackers, path, value, trust)
    yield partial(_check_run_folder, document)


def _refuse_key(path: Path) -> None:
    # Names of hooks, sets and metrics are printed in logs.
    raise ConfigFieldError("expected a printable key", path)


def check_renamed_fields(fields: Mapping[str, Plain]) -> None:
    """Refuse the former name of a renamed field.

    >>> check_renamed_fields({"schedule": {"class_type": "torch.optim.lr_scheduler:StepLR"}})
    Traceback (most recent call last):
    robo_orchard_core.utils.config.errors.ConfigFieldError: schedule: this field was renamed; \
write lr_scheduler instead

    Raises:
        ConfigFieldError: The error names the current field.
    """
    for path, new_name in RENAMED_FIELDS.items():
        inner: Plain | Mapping[str, Plain] = fields
        for key in path[:-1]:
            inner = inner.get(str(key)) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and path[-1] in inner:
            raise ConfigFieldError(f"this field was renamed; write {new_name} instead", path)


def _check_field(name: str, fields: Mapping[str, Plain]) -> None:
    """Check the name of a field, and the type of a mapping."""
    declared = ExperimentFields.model_fields
    if name == "trust":
        raise ConfigFieldError(
            "a file can't grant trust; pass --trust PACKAGE, or set trust in your own "
            "pyproject.toml",
            (name,),
        )
    if name not in declared:
        raise unknown_field(name, declared, "an experiment")
    if name not in fields:
        if declared[name].is_required():
            raise ConfigFieldError("a value is required here and none is given", (name,))
        return
    value = fields[name]
    kinds = union_members(declared[name].annotation)
    is_scalar = all(k in (str, int, NoneType) or get_origin(k) is Literal for k in kinds)
    is_null = value is None and NoneType in kinds
    if not (is_scalar or is_null or isinstance(value, dict)):
        raise ConfigFieldError(f"expected a mapping, found {describe(value)}", (name,))


def _check_named_entries(path: Path, value: Plain) -> None:
    if value is not None and not isinstance(value, dict):
        raise ConfigFieldError(f"expected a mapping of names, found {describe(value)}", path)
    incomplete: str | None = None
    for name, entry in (value or {}).items():
        if not isinstance(entry, dict):
            raise ConfigFieldError(f"expected a mapping, found {describe(entry)}", (*path, name))
        if incomplete is None and _REQUIRED_KEYS[path].isdisjoint(entry):
            incomplete = name
    # An override of one field under a misspelled name would create a new entry. Only the first
    # incomplete entry is compared: to compare thousands takes a minute.
    if incomplete is not None:
        others = [name for name in islice(value or {}, _MAX_COMPARED) if name != incomplete]
        if near := difflib.get_close_matches(incomplete, others, 1):
            problem = f"there is no entry of this name; did you mean {near[0]!r}?"
            raise ConfigFieldError(problem, (*path, incomplete))


def _is_reference(path: Path, value: Plain) -> bool:
    """Return True if a value names code; a function may be named alone (``collate_fn: m:f``)."""
    key = path[-1] if path else ""
    return key in PART_KEYS or (key in _FUNCTION_KEYS and isinstance(value, str))


def _check_reference(path: Path, reference: Plain, trust: Trust) -> None:
    if not isinstance(reference, str):
        problem = f"expected a name like 'package.module:Name', found {describe(reference)}"
        raise ConfigReferenceError(problem, path)
    if len(reference) > MAX_REFERENCE:
        problem = f"expected a name of at most {MAX_REFERENCE} characters, found {len(reference)}"
        raise ConfigReferenceError(problem, path)
    try:
        module, qualname = split_reference(reference)
    except ConfigReferenceError as error:
        if near := suggest(reference):
            error.problem += f"; did you mean {near!r}?"
        raise error.under(path) from None
    if not trust.covers(module, qualname):
        raise TrustError(f"{reference!r} is not trusted{_advice(reference, module)}", path)
    if any(name.startswith("__") for name in (*module.split("."), *qualname.split("."))):
        # To import a __main__ is to run a command.
        raise ConfigReferenceError(f"{reference!r} can't be named in a document", path)


def _advice(reference: str, module: str) -> str:
    """Return the remedy for untrusted code; no experiment needs Python's standard library."""
    if near := suggest(reference):
        return f"; did you mean {near!r}?"
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "__main__":
        return ""
    # Code of a catalogued package that is not in the catalogue was left out for a reason.
    package = reference if top in _CATALOGUED_PACKAGES else top
    return f"; if you trust its code, pass --trust {package}"


def _check_kind(path: Path, part: dict[str, Plain]) -> None:
    """Refuse catalogued code of another kind; the kind of other code is unknown here."""
    found = (kind for place, kind in _KINDS_BY_PATH.items() if _matches(path, place))
    expected = next(found, None)
    for key in PART_KEYS if expected else ():
        name = part.get(key)
        kind = kind_of(name) if isinstance(name, str) else None
        is_called = key == "func" and expected == "batch processor"
        if kind not in (None, expected) and not is_called:
            problem = f"expected {_with_article(expected)}, found {_with_article(kind)} ({name!r})"
            raise ConfigReferenceError(problem, (*path, key))


def _with_article(kind: str | None) -> str:
    is_vowel = kind in ("optimizer", "LR scheduler")
    return f"{'an' if is_vowel else 'a'} {kind}"


def _matches(path: Path, pattern: tuple[str, ...]) -> bool:
    return len(path) == len(pattern) and all(
        key in ("*", part) for part, key in zip(path, pattern, strict=True)
    )


def _check_trackers(path: Path, sink: dict[str, Plain], trust: Trust) -> None:
    """Refuse untrusted trackers: these packages send the data of a run to a service."""
    if _TRACKER_SINKS.isdisjoint(str(sink.get(key)) for key in PART_KEYS):
        return
    trackers = sink.get("trackers")
    for index, name in enumerate(trackers if isinstance(trackers, list) else ()):
        is_local = name == "tensorboard" or not isinstance(name, str)  # validation refuses others
        if not is_local and not trust.covers(str(name), ""):
            raise TrustError(
                f"the tracker {describe(name)} is not trusted; to send the run's data to it, pass "
                f"--trust {name}",
                (*path, "trackers", index),
            )


def _check_run_folder(document: ExperimentDocument) -> None:
    """Refuse a run folder, named by a file, outside of the current folder."""
    field = "name" if document.document.get("run_folder") is None else "run_folder"
    value = document.document.get(field)
    if not isinstance(value, str) or origin_of((field,), document.leaf_origins).layer != "file":
        return
    folder = FilePath("runs", value) if field == "name" else FilePath(value)
    problem = ""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(folder)
        leads_out = path.drive or path.root or not path.parts
        # Programs read hidden folders (and .. is one).
        is_hidden = any(part.startswith(".") for part in path.parts)
        if leads_out or is_hidden or not value.isprintable():
            problem = (
                "a file's run folder must lie below the current folder, without names that begin "
                f"with a dot; found {describe(value)}; for any other, pass --run_folder"
            )
    if not problem:
        problem = _folder_problem(folder)
    if problem:
        raise ConfigFieldError(problem, (field,))


def _folder_problem(folder: FilePath) -> str:
    """Return why a file can't name a run folder; empty for a usable folder."""
    if any(len(part.encode()) > _MAX_FOLDER_NAME for part in folder.parts):
        return f"expected names of at most {_MAX_FOLDER_NAME} bytes"
    for link in (folder, *folder.parents):
        if os.path.islink(link):
            return (
                f"a file's run folder can't lie behind the link {str(link)!r}; pass "
                "--run_folder FOLDER"
            )
    if has_only_other_files(folder):
        return f"the folder {str(folder)!r} holds other files and no run; pass --run_folder FOLDER"
    if (link_out := find_escaping_link(folder)) is not None:
        return f"the link {link_out!r} leads out of the run folder; remove the link, or pass " + (
            "--run_folder FOLDER"
        )
    return ""
