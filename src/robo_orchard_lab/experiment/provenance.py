"""One document over another: what the upper one says counts, the rest stays.

Mappings merge key by key, in the order of the lower one; anything else is replaced. A mapping
that names another class or function than the one beneath it replaces it whole, since its other
keys are that one's arguments. `null` removes an entry that users give a name to: a hook, an
evaluation set, a parameter group.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from robo_orchard_core.utils.config.document import Plain
from robo_orchard_core.utils.config.errors import ConfigFieldError, Path
from robo_orchard_core.utils.config.parts import PART_KEYS

# --- origins ---------------------------------------------------------------------------------
# Where the value of a field comes from.


Layer = Literal["command line", "environment", "code", "file", "default"]
"""What may say the value of a field, the strongest first."""


@dataclass(frozen=True)
class Origin:
    """What said the value of a field.

    >>> str(Origin("file", "digits.yaml:12")), str(Origin("command line", "--trainer.max_epoch"))
    ('digits.yaml:12', 'command line: --trainer.max_epoch')

    Attributes:
        layer: Which kind of source it is.
        where: The file and the line where it is known, the option as typed, or the variable's
            name; empty for a default.
    """

    layer: Layer
    where: str = ""

    def __str__(self) -> str:
        if self.layer == "file":
            return self.where
        return f"{self.layer}: {self.where}" if self.where else self.layer


Origins = dict[Path, Origin]
"""The origins of values, by their paths."""

DEFAULT = Origin("default")


def origin_of(path: Path, origins: Mapping[Path, Origin]) -> Origin:
    """The origin of the value at ``path``, or of the nearest one above it that has any.

    >>> origins = {("betas",): Origin("file", "a.yaml:3")}
    >>> str(origin_of(("betas", 0), origins))
    'a.yaml:3'
    >>> str(origin_of(("seed",), {}))
    'default'
    """
    for end in range(len(path), -1, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return DEFAULT


NAMED_ENTRIES: frozenset[Path] = frozenset(
    {("hooks",), ("data", "evaluation"), ("optimizer", "groups")}
)
"""The mappings whose keys are names that users choose."""

_COMPARED = 200  # names, with one that may be misspelt


class ItemChange(dict[str, Plain]):
    """Stands over a list: what changes in one of its items."""

    def __init__(self, index: int, value: Plain) -> None:
        super().__init__()
        self.index = index
        self.value = value


def merged(beneath: dict[str, Plain], above: dict[str, Plain]) -> dict[str, Plain]:
    """``above`` over ``beneath``, which stay as they are.

    >>> merged({"hooks": {"a": {"x": 1}, "b": {}}}, {"hooks": {"b": None, "a": {"y": 2}}})
    {'hooks': {'a': {'x': 1, 'y': 2}}}
    >>> merged({"model": {"func": "m:f", "x": 1}}, {"model": {"func": "m:g"}})
    {'model': {'func': 'm:g'}}

    Raises:
        ConfigFieldError: ``above`` removes an entry that isn't there.
    """
    return merged_with_origins((beneath, {}), (above, {}))[0]


def merged_with_origins(
    beneath: tuple[dict[str, Plain], Origins], above: tuple[dict[str, Plain], Origins]
) -> tuple[dict[str, Plain], Origins]:
    """The same for documents whose values have origins."""
    merger = _Merger(beneath[1], above[1])
    return merger.mapping(beneath[0], above[0], ()), merger.origins


def names_another(beneath: dict[str, Plain], above: dict[str, Plain]) -> bool:
    """Whether ``above`` is for other code than ``beneath``, where both name some."""
    old, new = (
        {key: part[key] for key in PART_KEYS if part.get(key) is not None}
        for part in (beneath, above)
    )
    return bool(old) and any(old.get(key) != name for key, name in new.items())


def paths(value: Plain, path: Path = ()) -> Iterator[Path]:
    """The paths of a value and of all that it holds."""
    return (inner for inner, _ in with_paths(value, path))


def with_paths(value: Plain, path: Path = ()) -> Iterator[tuple[Path, Plain]]:
    """A value and all that it holds, each with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from with_paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from with_paths(item, (*path, index))


def listed(names: Iterable[str]) -> str:
    """The first of some names that a document has, for a message.

    >>> listed(["a", "b"]), listed([])
    ("'a', 'b'", 'none')
    """
    first = [repr(name) for name in islice(names, 11)]
    return ", ".join([*first[:10], *["..."] * (len(first) > 10)]) or "none"


class _Merger:
    def __init__(self, beneath: Origins, above: Origins) -> None:
        self._beneath = beneath
        self._above = above
        self.origins: Origins = {}

    def mapping(self, beneath: Plain, above: dict[str, Plain], path: Path) -> dict[str, Plain]:
        below: dict[str, Plain] = {}
        if isinstance(beneath, dict) and not names_another(beneath, above):
            below = beneath
            self._take(self._beneath, path)
        else:
            self._take(self._above, path)
        result: dict[str, Plain] = {}
        for key in (*below, *(key for key in above if key not in below)):
            inner = (*path, key)
            if key not in above:
                result[key] = self._whole(below[key], inner, self._beneath)
            elif above[key] is None and path in NAMED_ENTRIES:
                if key not in below:
                    raise self._nothing_to_remove(key, below, inner)
            else:
                result[key] = self._value(below.get(key), above[key], inner)
        return result

    def _value(self, beneath: Plain, above: Plain, path: Path) -> Plain:
        if isinstance(above, ItemChange) and isinstance(beneath, list):
            self._take(self._beneath, path)
            return [
                self._value(item, above.value, (*path, index))
                if index == above.index
                else self._whole(item, (*path, index), self._beneath)
                for index, item in enumerate(beneath)
            ]
        if isinstance(above, dict):
            return self.mapping(beneath, above, path)
        return self._whole(above, path, self._above)

    def _whole(self, value: Plain, path: Path, origins: Origins) -> Plain:
        for inner in paths(value, path) if origins else ():
            self._take(origins, inner)
        return value

    def _take(self, origins: Origins, path: Path) -> None:
        if path in origins:
            self.origins[path] = origins[path]

    def _nothing_to_remove(
        self, name: str, beneath: dict[str, Plain], path: Path
    ) -> ConfigFieldError:
        near = difflib.get_close_matches(name, [*islice(beneath, _COMPARED)], n=1)
        known = f"did you mean {near[0]!r}?" if near else f"there is {listed(beneath)}"
        error = ConfigFieldError(f"null removes an entry, and none has this name; {known}", path)
        if path in self._above:
            error.source = str(self._above[path])
        return error


def all_from(value: Plain, origin: Origin, path: Path = ()) -> Origins:
    """The origins of a value that comes from one place."""
    return dict.fromkeys(paths(value, path), origin)
