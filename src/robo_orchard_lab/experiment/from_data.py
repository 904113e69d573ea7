"""Values from the data: ``{from_data: NAME}`` in a file is an attribute of a dataset, as data.

A name is a path without expressions: public attributes, keys of mappings, indexes of sequences, and
``len`` at the end for a number of entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from robo_orchard_core.utils.config import Config, ConfigFieldError
from robo_orchard_core.utils.config.errors import at_path, describe, suggest_name, unknown_field
from robo_orchard_core.utils.config.formats import check_plain
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_core.utils.config.references import union_members

FROM_DATA = "from_data"
TRAIN = "train"
_KEYS = (FROM_DATA, "dataset")
_NAME = re.compile(r"[^.]+(\.[^.]+)*")
_LENGTH = "len"
FIELDS_FROM_DATA = ("model", "batch_processor", "hooks")
"""Fields of an experiment in which values may come from the data."""


def is_from_data(value: Any, declaration: Any = None) -> bool:
    """Return True for ``{from_data: NAME}``, also with the name of a dataset.

    Raises:
        ConfigFieldError: The mapping is malformed.
    """
    if not isinstance(value, dict) or FROM_DATA not in value:
        return False
    for key, name in value.items():
        if key not in _KEYS:
            raise unknown_field(str(key), _KEYS, FROM_DATA)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigFieldError(
                f"expected a name such as num_classes or classes.len, found {describe(name)}",
                (key,),
            )
        if any(part.startswith("_") for part in name.split(".")):
            raise ConfigFieldError("expected a public name, without a leading underscore", (key,))
    return True


def check_stand_ins(experiment: Config) -> None:
    """Refuse ``from_data`` and ``auto`` in fields where nothing replaces them.

    Raises:
        ConfigFieldError: With the path of the value.
    """
    for path, value, declaration in _walk(experiment):
        if path[:1] != ("lr_scheduler",) and value == "auto" and int in union_members(declaration):
            raise ConfigFieldError(
                "expected an integer; auto is for the parameters of lr_scheduler", path
            )
        if isinstance(value, dict) and path[:1] not in [(field,) for field in FIELDS_FROM_DATA]:
            with at_path(*path):
                if is_from_data(value):
                    raise ConfigFieldError(
                        f"{FROM_DATA} is for {', '.join(FIELDS_FROM_DATA)}; write the value here"
                    )


def named_datasets(part: Any) -> set[str]:
    """Return the names of the datasets that ``{from_data: ...}`` values in a config refer to."""
    return {value.get("dataset", TRAIN) for _, value, _ in _walk(part) if is_from_data(value)}


def _walk(value: Any, path: tuple[str | int, ...] = (), kind: Any = None) -> Iterator[Any]:
    """Yield path, value and declared type of all values in configs, mappings and lists."""
    yield path, value, kind
    if isinstance(value, Config):
        fields = type(value).model_fields
        for name, inner in field_values(value).items():
            if type(inner) not in (str, int, float, bool, type(None)) or inner == "auto":
                declared = fields[name].annotation if name in fields else None
                # Of declared configs, such as accelerator.cpu, auto is a value like others.
                yield from _walk(inner, (*path, name), declared if value.is_sparse else None)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*path, index))


def replaced(value: Any, read: Callable[[dict[str, str]], Any]) -> Any:
    """Return a part with ``read(entry)`` in place of each ``{from_data: NAME}``.

    Raises:
        ConfigFieldError: A value has another type than its parameter; the error has its path.
    """
    if is_from_data(value):
        return read(value)
    if isinstance(value, Config):
        changes = _changes(field_values(value).items(), read)
        return value.replace(**changes) if changes else value
    if isinstance(value, dict):
        changes = _changes(value.items(), read)
        return {**value, **changes} if changes else value
    if isinstance(value, list | tuple):
        changes = _changes(enumerate(value), read)
        items = (changes.get(index, item) for index, item in enumerate(value))
        return type(value)(items) if changes else value
    return value


def _changes(
    items: Iterable[tuple[Any, Any]], read: Callable[[dict[str, str]], Any]
) -> dict[Any, Any]:
    found = {}
    for key, inner in items:
        with at_path(key):
            new = replaced(inner, read)
        if new is not inner:
            found[key] = new
    return found


def read_value(dataset: Any, name: str) -> Any:
    """Return the value of a name in a dataset, as plain data.

    >>> from types import SimpleNamespace
    >>> digits = SimpleNamespace(classes=["a", "b"], statistics={"mean": [0.5]})
    >>> [read_value(digits, name) for name in ("classes.len", "statistics.mean.0")]
    [2, 0.5]

    Raises:
        ConfigFieldError: There is no such value, or the value is no plain data.
    """
    value, parts = dataset, name.split(".")
    for position, part in enumerate(parts):
        of = type(value).__name__
        if isinstance(value, Mapping):
            if part in value:
                value = value[part]
                continue
            known = [str(key) for key in value]
        elif isinstance(value, Sequence) and part.isdecimal():
            if int(part) < len(value):
                value = value[int(part)]
                continue
            known = [f"{len(value)} entries"]
        elif hasattr(value, part):
            value = getattr(value, part)
            continue
        else:
            known = [each for each in dir(value) if not each.startswith("_")]
        if part == _LENGTH and position == len(parts) - 1 and isinstance(value, Sized):
            value = len(value)
            continue
        raise ConfigFieldError(f"{of} has no {part!r}; {suggest_name(part, known, 'it has')}")
    for convert in ("tolist", "item"):  # of tensors and NumPy's arrays and numbers
        if callable(method := getattr(value, convert, None)):
            value = method()
            break
    if isinstance(value, tuple | set | frozenset | range):
        value = [*value]
    try:
        return check_plain(value)
    except ValueError as error:
        raise ConfigFieldError(
            f"expected numbers, text, lists or mappings at {name!r}, found {describe(value)}"
        ) from error
