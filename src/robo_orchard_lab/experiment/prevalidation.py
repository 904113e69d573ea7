"""Checks of an experiment's document before anything is imported.

Only names and paths are compared here. Fields of parts, kinds and types require the code; they
are checked when the document is validated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path as FilePath
from types import NoneType
from typing import Literal, get_origin

from pydantic import BeforeValidator

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    MAX_PROBLEMS,
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    Path,
    TrustError,
    describe,
    did_you_mean,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import Plain, check_plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_core.utils.config.references import split_reference, union_members
from robo_orchard_core.utils.untrusted_text import MAX_NAME_BYTES, path_problem
from robo_orchard_lab.experiment.catalogue import DEFINITIONS, kind_of, suggest
from robo_orchard_lab.experiment.document import ExperimentDocument, check_bounds
from robo_orchard_lab.experiment.overrides import (
    OPTIMIZERS,
    are_named_parts,
    has_named_entries,
    origin_of,
    walk,
)
from robo_orchard_lab.experiment.parts import ExperimentFields
from robo_orchard_lab.experiment.run_folder import find_escaping_link, has_only_other_files
from robo_orchard_lab.foreign_fields import foreign_remedy

MAX_REFERENCE = 300
"""Maximum length of a reference to code, in characters."""

RENAMED_FIELDS: dict[Path, str] = {
    ("schedule",): "lr_scheduler",
    ("trainer", "schedule_every"): "lr_scheduler.every",
}
"""Current names of fields by their former paths."""

_FUNCTION_KEYS = ("collate_fn", "worker_init_fn")  # of loaders; elsewhere such a key may hold text

_KINDS_BY_PATH: dict[Path, str] = {
    ("model",): "a module",
    ("batch_processor",): "a batch processor",
    ("optimizer",): "an optimizer",
    ("lr_scheduler",): "an LR scheduler",
    ("data", "train", "sampler"): "a sampler",
    ("data", "train", "batch_sampler"): "a sampler",
}
"""Required kinds of catalogued code; datasets are missing since any iterable may be one."""

_CATALOGUED_PACKAGES = {name.partition(".")[0] for name in DEFINITIONS}

_REQUIRED_KEYS: dict[str, frozenset[str]] = {
    "evaluation": frozenset({"dataset"}),
    "test": frozenset({"dataset"}),
    "groups": frozenset({"parameters"}),
}
"""Keys of which each entry of such a mapping must have one; others hold parts."""

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
    found: dict[Path, ConfigError] = {}
    for error in islice(_problems(document, trust), MAX_PROBLEMS):
        found.setdefault(error.path, document.locate(error))
    if found:
        first, *others = found.values()
        first.others = tuple(others)
        raise first from None


def _problems(document: ExperimentDocument, trust: Trust) -> Iterator[ConfigError]:
    fields = document.document
    try:
        check_plain(fields)
        check_bounds(fields)
        check_renamed_fields(fields)
    except ConfigFieldError as error:
        yield error
    except ConfigError as error:
        yield error
        return
    unknown = [name for name in fields if name not in ExperimentFields.model_fields]
    for name in dict.fromkeys([*fields, *ExperimentFields.model_fields]):
        yield from _field_problems(name, fields, lists_fields=name in unknown[:1])
    named = [path for path in OPTIMIZERS if are_named_parts(fields.get(str(path[0])))]
    for path, value in walk(fields):
        key = path[-1] if path else ""
        if not str(key).isprintable():  # names of hooks, sets and metrics are printed in logs
            yield ConfigFieldError("expected a printable key", path)
        if has_named_entries(path, value):
            yield from _entry_problems(path, value)
        # A function may be named alone, as in `collate_fn: m:f`.
        if key in PART_KEYS or (key in _FUNCTION_KEYS and isinstance(value, str)):
            yield from _reference_problems(path, value, trust)
        if isinstance(value, dict):
            yield from _kind_problems(path, value, named)
            yield from _tracker_problems(path, value, trust)
            yield from _weights_problems(path, value)
    yield from _run_folder_problems(document)


def check_renamed_fields(fields: Mapping[str, Plain]) -> None:
    """Refuse the former name of a renamed field.

    >>> check_renamed_fields({"schedule": {"class_type": "torch.optim.lr_scheduler:StepLR"}})
    Traceback (most recent call last):
    robo_orchard_core.utils.config.errors.ConfigFieldError: schedule: this field was renamed; \
write lr_scheduler instead
    """
    for path, new_name in RENAMED_FIELDS.items():
        inner: Plain | Mapping[str, Plain] = fields
        for key in path[:-1]:
            inner = inner.get(str(key)) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and path[-1] in inner:
            raise ConfigFieldError(f"this field was renamed; write {new_name} instead", path)


def _field_problems(
    name: str, fields: Mapping[str, Plain], *, lists_fields: bool
) -> Iterator[ConfigError]:
    """Check the name of a field, and the type of a mapping."""
    declared = ExperimentFields.model_fields
    if name == "trust":
        problem = (
            "a file can't grant trust; pass --trust PACKAGE, or set trust in your own "
            "pyproject.toml"
        )
        yield ConfigFieldError(problem, (name,))
    elif name not in declared:
        remedy = foreign_remedy("trainer", name, fields[name], "file")
        error = unknown_field(name, declared, "an experiment", remedy=remedy)
        if not lists_fields and "it has" in error.problem:
            error.problem = "an experiment has no such field"
        yield error
    elif name in fields:
        value, kinds = fields[name], union_members(declared[name].annotation)
        if all(k in (str, int, NoneType) or get_origin(k) is Literal for k in kinds):
            return
        marks = declared[name].metadata
        admits_bool = bool in kinds or any(isinstance(mark, BeforeValidator) for mark in marks)
        is_list = any(get_origin(kind) is list for kind in kinds)
        is_null = value is None and NoneType in kinds
        is_bool = isinstance(value, bool) and admits_bool
        if not (is_null or is_bool or isinstance(value, list if is_list else dict)):
            expected = "a list" if is_list else "a mapping"
            expected += ", true or false" if admits_bool else ""
            yield ConfigFieldError(f"expected {expected}, found {describe(value)}", (name,))
    elif declared[name].is_required():
        yield ConfigFieldError("a value is required here and none is given", (name,))


def _entry_problems(path: Path, value: Plain) -> Iterator[ConfigError]:
    if value is None:
        return
    if not isinstance(value, dict):
        yield ConfigFieldError(f"expected a mapping of names, found {describe(value)}", path)
        return
    required = _REQUIRED_KEYS.get(str(path[-1]), frozenset(PART_KEYS))
    incomplete: str | None = None
    for name, entry in value.items():
        if not isinstance(entry, dict):
            advice = ""
            if path in OPTIMIZERS:
                several = ", ".join(key for key in value if isinstance(value[key], dict))
                advice = f"; these are named: {several:.200}; write fields inside of each"
            problem = f"expected a mapping, found {describe(entry)}{advice}"
            yield ConfigFieldError(problem, (*path, name))
        elif incomplete is None and required.isdisjoint(entry):
            incomplete = name
    # An override of one field under a misspelled name would create a new entry. Only the first
    # incomplete entry is compared: to compare thousands takes a minute.
    if incomplete is not None:
        others = [name for name in islice(value, _MAX_COMPARED) if name != incomplete]
        if advice := did_you_mean(incomplete, others):
            problem = f"there is no entry of this name; {advice}"
            yield ConfigFieldError(problem, (*path, incomplete))


def _reference_problems(path: Path, reference: Plain, trust: Trust) -> Iterator[ConfigError]:
    if not isinstance(reference, str):
        problem = f"expected a name like 'package.module:Name', found {describe(reference)}"
        yield ConfigReferenceError(problem, path)
        return
    if len(reference) > MAX_REFERENCE:
        problem = f"expected a name of at most {MAX_REFERENCE} characters, found {len(reference)}"
        yield ConfigReferenceError(problem, path)
        return
    try:
        module, qualname = split_reference(reference)
    except ConfigReferenceError as error:
        if near := suggest(reference):
            error.problem += f"; did you mean {near!r}?"
        yield error.under(path)
        return
    if not trust.covers(module, qualname):
        top = module.partition(".")[0]
        advice = ""
        if near := suggest(reference):
            advice = f"; did you mean {near!r}?"
        elif top not in sys.stdlib_module_names and top != "__main__":
            # Code of a catalogued package that is not in the catalogue was left out for a reason.
            package = reference if top in _CATALOGUED_PACKAGES else top
            advice = f"; if you trust its code, pass --trust {package}"
        yield TrustError(f"{reference!r} is not trusted{advice}", path)
    elif any(name.startswith("__") for name in (*module.split("."), *qualname.split("."))):
        # To import a __main__ is to run a command.
        yield ConfigReferenceError(f"{reference!r} can't be named in a document", path)


def _kind_problems(
    path: Path, part: dict[str, Plain], named: Collection[Path]
) -> Iterator[ConfigError]:
    """Refuse catalogued code of another kind; the kind of other code is unknown here.

    Args:
        path: Path of the part.
        part: Mapping at the path.
        named: Paths of named optimizers or LR schedulers.
    """
    expected = _KINDS_BY_PATH.get(path)
    if len(path) == 2 and path[0] == "hooks":
        expected = "a hook"
    elif len(path) == 2 and path[:1] in named:
        expected = _KINDS_BY_PATH[path[:1]]
    if expected == "an optimizer" and "params" in part:
        problem = "is given when it is built; write patterns instead, as parameters: 'layers.*'"
        yield ConfigFieldError(problem, (*path, "params"))
    for key in PART_KEYS if expected else ():
        name = part.get(key)
        kind = kind_of(name) if isinstance(name, str) else None
        if path in OPTIMIZERS and kind == expected:
            for inner, value in part.items():
                if isinstance(value, dict) and kind_of(str(value.get(key))) == expected:
                    yield ConfigFieldError(
                        f"expected {expected} or a mapping of names, found both; give the part "
                        f"with {key}: {name} a name, too",
                        (*path, inner),
                    )
        is_called = key == "func" and expected == "a batch processor"
        if kind not in (None, expected) and not is_called:
            yield ConfigReferenceError(
                f"expected {expected}, found {kind} ({name!r})", (*path, key)
            )


def _tracker_problems(path: Path, sink: dict[str, Plain], trust: Trust) -> Iterator[ConfigError]:
    """Refuse untrusted trackers: these packages send the data of a run to a service."""
    if _TRACKER_SINKS.isdisjoint(str(sink.get(key)) for key in PART_KEYS):
        return
    trackers = sink.get("trackers")
    for index, name in enumerate(trackers if isinstance(trackers, list) else ()):
        is_local = name == "tensorboard" or not isinstance(name, str)  # validation refuses others
        if not is_local and not trust.covers(str(name), ""):
            problem = (
                f"the tracker {describe(name)} is not trusted; to send the run's data to it, pass "
                f"--trust {name}"
            )
            yield TrustError(problem, (*path, "trackers", index))


def _weights_problems(path: Path, part: dict[str, Plain]) -> Iterator[ConfigError]:
    """Refuse weights without a name: torchvision downloads weights for any other true value."""
    if not str(part.get("func")).startswith("torchvision.models."):
        return
    for key, value in part.items():
        if key.startswith("pretrained"):
            yield ConfigFieldError("this is outdated; write weights: DEFAULT", (*path, key))
        if key.startswith("weights") and not (value is None or isinstance(value, str)):
            problem = "expected the name of published weights, such as DEFAULT, or null"
            yield ConfigFieldError(f"{problem}, found {describe(value)}", (*path, key))


def _run_folder_problems(document: ExperimentDocument) -> Iterator[ConfigError]:
    """Refuse a run folder, named by a file, outside of the current folder."""
    field = "name" if document.document.get("run_folder") is None else "run_folder"
    value = document.document.get(field)
    if not isinstance(value, str):
        return
    if value.startswith("~") or "$" in value:
        yield ConfigFieldError(
            f"expected a folder, found {describe(value)}; write it in full: only a shell replaces "
            "~ and $",
            (field,),
        )
        return
    if origin_of((field,), document.leaf_origins).layer != "file":
        return
    folder = FilePath("runs", value) if field == "name" else FilePath(value)
    if any(len(part.encode()) > MAX_NAME_BYTES for part in folder.parts):
        problem = f"expected names of at most {MAX_NAME_BYTES} bytes"
    elif (
        (leads_out := path_problem(value))
        or not FilePath(value).parts
        or any(
            part.startswith(".")
            for part in folder.parts  # programs read hidden folders
        )
    ):
        problem = (
            "a file's run folder must lie below the current folder, without names that begin "
            f"with a dot; found {describe(value)}{f', which {leads_out}' if leads_out else ''}; "
            "for any other, pass --run_folder"
        )
    else:
        problem = _folder_problem(folder)
    if problem:
        yield ConfigFieldError(problem, (field,))


def _folder_problem(folder: FilePath) -> str:
    """Return why a file can't name a run folder; empty for a usable folder."""
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
