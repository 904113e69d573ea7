"""Values of an experiment by source: merging of documents, provenance, and overrides.

Mappings are merged key by key, in the order of the lower document; other values are replaced. A
mapping that names another class or function replaces the lower mapping, whose keys are arguments
of other code; so do named optimizers in place of one optimizer, and the reverse. ``null`` removes
an entry with a user-chosen name: a hook, an evaluation set, an optimizer, a parameter group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

from robo_orchard_core.utils.config import Config, formats
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    Path,
    parse_path,
    suggest_name,
)
from robo_orchard_core.utils.config.formats import Plain, check_plain, check_utf8
from robo_orchard_core.utils.config.parts import PART_KEYS, is_part

Layer = Literal["command line", "environment", "code", "file", "default"]
"""Sources of a value, the strongest first."""


@dataclass(frozen=True)
class Origin:
    """Source of a value.

    >>> str(Origin("file", "digits.yaml:12")), str(Origin("command line", "--trainer.max_epoch"))
    ('digits.yaml:12', 'command line: --trainer.max_epoch')

    Attributes:
        layer: Kind of source.
        where: File with line, option as typed, or name of the variable; empty for a default.
    """

    layer: Layer
    where: str = ""

    def __str__(self) -> str:
        if self.layer == "file":
            return self.where
        return f"{self.layer}: {self.where}" if self.where else self.layer

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Set this origin as the source of an error in a block."""
        try:
            yield
        except ConfigError as error:
            error.source = str(self)
            raise


Origins = dict[Path, Origin]
"""Origins of values by path."""

DEFAULT = Origin("default")


def origin_of(path: Path, origins: Mapping[Path, Origin]) -> Origin:
    """Return the origin of a value, or of its nearest parent with an origin.

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


def walk(value: Plain, path: Path = ()) -> Iterator[tuple[Path, Plain]]:
    """Yield a value and all values inside, each with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


def leaves(value: Plain, path: Path = ()) -> Iterator[tuple[Path, Plain]]:
    """Yield the values of a document that hold no others, with their paths.

    >>> list(leaves({"seed": 0, "hidden": [8, 8], "sinks": [{"path": "a"}]}))
    [(('seed',), 0), (('hidden',), [8, 8]), (('sinks', 0, 'path'), 'a')]
    """
    inner: list[tuple[str | int, Plain]] = []
    if isinstance(value, dict):
        inner += value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner += enumerate(value)
    if not inner:
        yield path, value
    for key, item in inner:
        yield from leaves(item, (*path, key))


OPTIMIZERS: frozenset[Path] = frozenset({("optimizer",), ("lr_scheduler",)})
"""Fields that hold one part, or parts by the names of optimizers; see `are_named_parts`."""


def are_named_parts(value: object) -> bool:
    """Return True for parts by name, False for one part and for other values.

    >>> are_named_parts({"g": {"class_type": "torch.optim:Adam"}, "d": {}})
    True
    >>> are_named_parts({"class_type": "mine:Lookahead", "base": {"class_type": "torch.optim:SGD"}})
    False
    """
    if not isinstance(value, Mapping) or is_part(value):
        return False
    inner = [*value.values()]
    are_configs = bool(inner) and all(isinstance(part, Mapping | Config) for part in inner)
    return are_configs or any(map(is_part, inner))


def has_named_entries(path: Path, value: object) -> bool:
    """Return True if the keys of the mapping at a path are user-chosen names."""
    if path in OPTIMIZERS:
        return are_named_parts(value)
    if path[:1] == ("optimizer",) and len(path) <= 3 and path[-1] == "groups":
        # Not of an optimizer with this name, and mostly not of an argument's own mapping.
        return not is_part(value) and (len(path) == 2 or are_named_parts(value))
    return path in (("hooks",), ("data", "evaluation"), ("data", "test"))


_MAX_COMPARED = 200  # names compared with a misspelled one


class ItemChange(dict[str, Plain]):
    """Change of one item in a list of the lower document."""

    def __init__(self, index: int, value: Plain) -> None:
        super().__init__()
        self.index = index
        self.value = value


Located: TypeAlias = tuple[dict[str, Plain], Origins]
"""Document with the origins of its values."""


def merge(beneath: Located, above: Located) -> Located:
    """Merge ``above`` over ``beneath``; both stay unchanged.

    >>> merge(({"hooks": {"a": {"x": 1}}}, {}), ({"hooks": {"a": {"y": 2}, "b": {}}}, {}))[0]
    {'hooks': {'a': {'x': 1, 'y': 2}, 'b': {}}}
    >>> merge(({"model": {"func": "m:f", "x": 1}}, {}), ({"model": {"func": "m:g"}}, {}))[0]
    {'model': {'func': 'm:g'}}

    Raises:
        ConfigFieldError: ``above`` removes an entry that doesn't exist.
    """
    merger = _Merger(beneath[1], above[1])
    return merger.mapping(beneath[0], above[0], ()), merger.origins


def names_other_code(beneath: dict[str, Plain], above: dict[str, Plain]) -> bool:
    """Return True if both mappings name code, and ``above`` another class or function."""
    old, new = (
        {key: part[key] for key in PART_KEYS if part.get(key) is not None}
        for part in (beneath, above)
    )
    return bool(old) and any(old.get(key) != name for key, name in new.items())


def _has_other_form(beneath: dict[str, Plain], above: dict[str, Plain]) -> bool:
    """Return True for one optimizer over named ones, and for named ones over one."""
    if is_part(above):
        return not is_part(beneath) and any(map(is_part, beneath.values()))
    is_new = bool(above) and beneath.keys().isdisjoint(above)
    return is_part(beneath) and is_new and all(map(is_part, above.values()))


class _Merger:
    """Merge of two documents, with the origins of the result."""

    def __init__(self, beneath: Origins, above: Origins) -> None:
        self._beneath = beneath
        self._above = above
        self.origins: Origins = {}

    def mapping(self, beneath: Plain, above: dict[str, Plain], path: Path) -> dict[str, Plain]:
        is_merged = isinstance(beneath, dict) and not (
            names_other_code(beneath, above)
            or (path in OPTIMIZERS and self._has_other_form(beneath, above, path))
        )
        below: dict[str, Plain] = beneath if is_merged else {}  # type: ignore[assignment]  # a dict
        self._copy_origin(self._beneath if is_merged else self._above, path)
        has_names = has_named_entries(path, below or above)
        result: dict[str, Plain] = {}
        for key in (*below, *(key for key in above if key not in below)):
            inner = (*path, key)
            if key not in above:
                result[key] = self._unmerged(below[key], inner, self._beneath)
            elif above[key] is not None or not has_names:
                result[key] = self._value(below.get(key), above[key], inner)
            elif key not in below:
                advice = suggest_name(key, [*islice(below, _MAX_COMPARED)], "there is")
                problem = f"null removes an entry, and none has this name; {advice}"
                error = ConfigFieldError(problem, inner)
                error.source = str(self._above[inner]) if inner in self._above else None
                raise error
        return result

    def _has_other_form(
        self, beneath: dict[str, Plain], above: dict[str, Plain], path: Path
    ) -> bool:
        own = self._above.get(path)
        if own is not None and own.layer != "file":  # a part may be an argument of a class
            named = (self._beneath.get((*path, key)) for key in PART_KEYS)
            if any(origin is not None and origin.layer == own.layer for origin in named):
                return False
        return _has_other_form(beneath, above)

    def _value(self, beneath: Plain, above: Plain, path: Path) -> Plain:
        if isinstance(above, ItemChange) and isinstance(beneath, list):
            self._copy_origin(self._beneath, path)
            return [
                self._value(item, above.value, (*path, index))
                if index == above.index
                else self._unmerged(item, (*path, index), self._beneath)
                for index, item in enumerate(beneath)
            ]
        if isinstance(above, dict):
            return self.mapping(beneath, above, path)
        return self._unmerged(above, path, self._above)

    def _unmerged(self, value: Plain, path: Path, origins: Origins) -> Plain:
        for inner, _ in walk(value, path) if origins else ():
            self._copy_origin(origins, inner)
        return value

    def _copy_origin(self, origins: Origins, path: Path) -> None:
        if path in origins:
            self.origins[path] = origins[path]


ENVIRONMENT_PREFIX = "ROBO_ORCHARD_LAB__"

_OPTION = re.compile(r'(?:"(?:[^"\\]|\\.)*+"|[^"=])*+(?==|\Z)')
_MAX_TEXT = 2**16


@dataclass(frozen=True)
class Override:
    """Value for one path of the document.

    Attributes:
        path: Keys from the top; an index of a list as text.
        value: Parsed value: a YAML scalar, or a collection in flow style.
        text: Value as typed; None for values from code.
        origin: Source of the value.
    """

    path: tuple[str, ...]
    value: Plain
    text: str | None
    origin: Origin

    @property
    def names_code(self) -> bool:
        """Return True if the override names a class or function."""
        return any(path[-1] in PART_KEYS for path, _ in walk(self.value, self.path))


def from_arguments(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split a command line into parsed overrides and other arguments.

    >>> overrides, rest = from_arguments(["a.yaml", "--seed", "3", "--hooks.stats=null"])
    >>> [(o.path, o.value) for o in overrides], rest
    ([(('seed',), 3), (('hooks', 'stats'), None)], ['a.yaml'])

    Args:
        arguments: ``--path value`` and ``--path=value`` are overrides, up to an argument ``--``.

    Raises:
        ConfigError: A path is malformed or has no value.
    """
    overrides: list[Override] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += waiting
        elif not argument.startswith("--"):
            rest.append(argument)
        else:
            # An equals sign within a quoted key belongs to the key.
            match = _OPTION.match(argument)
            option = match[0] if match else argument.partition("=")[0]
            text = argument[len(option) + 1 :]
            origin = Origin("command line", option)
            with origin.as_source():
                if option == argument and ((text := next(waiting, "--")).startswith("--")):
                    raise ConfigFieldError(f"expected a value, as in {option}=VALUE")
                path = parse_path(option.removeprefix("--"))
                overrides.append(_override(path, text, origin))
    return overrides, rest


def from_environment(environ: Mapping[str, str], document: Mapping[str, Plain]) -> list[Override]:
    """Parse overrides in environment variables, such as ``ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH``.

    >>> environ = {"ROBO_ORCHARD_LAB__HOOKS__STATS__EVERY": "50 steps", "PATH": "/bin"}
    >>> [override] = from_environment(environ, {"hooks": {"Stats": {}}})
    >>> override.path, override.value
    (('hooks', 'Stats', 'every'), '50 steps')

    Args:
        environ: Environment; variables without the prefix are ignored.
        document: Document whose keys are matched, ignoring case. New keys are lower case.

    Raises:
        ConfigError: A variable has an empty key, or a key that matches two keys of the document.
    """
    overrides = []
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            origin = Origin("environment", name)
            with origin.as_source():
                path = _path_of_variable(name.removeprefix(ENVIRONMENT_PREFIX), document)
                overrides.append(_override(path, environ[name], origin))
    return overrides


def _path_of_variable(levels: str, document: Mapping[str, Plain]) -> tuple[str, ...]:
    path: tuple[str, ...] = ()
    inside: object = document
    for level in levels.split("__"):
        if not level:
            raise ConfigFieldError(
                f"expected keys between two underscores each, as in {ENVIRONMENT_PREFIX}"
                "TRAINER__MAX_EPOCH; found an empty one",
                path,
            )
        if isinstance(inside, list):
            inside = {str(index): item for index, item in enumerate(inside)}
        known: Mapping[str, object] = inside if isinstance(inside, Mapping) else {}
        same = [key for key in known if key.lower() == level.lower()]
        if len(same) > 1 and level not in same:
            names = ", ".join(map(repr, same))
            raise ConfigFieldError(
                f"{level!r} matches each of {names:.200}; pass an option instead", path
            )
        key = level if level in same else same[0] if same else level.lower()
        path = (*path, key)
        inside = known.get(key)
    return path


def from_mapping(values: Mapping[str, object]) -> list[Override]:
    """Parse overrides from code: a mapping by dotted path, or a nested mapping.

    >>> [o.path for o in from_mapping({"trainer.max_epoch": 3, "data": {"train": {}}})]
    [('trainer', 'max_epoch'), ('data',)]

    Raises:
        ConfigError: A path is malformed, or a value is not plain data.
    """
    origin = Origin("code", "overrides=")
    overrides = []
    with origin.as_source():
        for key, value in values.items():
            path = parse_path(key)
            overrides.append(Override(path, check_plain(value, path), None, origin))
    return overrides


def parse_value(text: str) -> Plain:
    """Parse a typed value as YAML: a scalar, or a collection in flow style.

    Other YAML, such as ``a: b``, ``*.bias`` or infinity, is text.

    >>> parse_value("3"), parse_value("[1, x]"), parse_value("*.bias"), parse_value("'3'")
    (3, [1, 'x'], '*.bias', '3')

    Raises:
        ConfigSyntaxError: A collection or quoted text is malformed or too large.
    """
    text = text.strip()
    if len(text) > _MAX_TEXT:
        raise ConfigSyntaxError(f"the value is longer than {_MAX_TEXT} characters")
    check_utf8(text, ())
    if not text.startswith(("{", "[", '"', "'")):
        try:
            scalar = formats.read_yaml_scalar(text)
        except ValueError:
            return text
        return text if isinstance(scalar, float) and not math.isfinite(scalar) else scalar
    # Only a mapping is a document, so the text is parsed as the value of one.
    value = formats.read(f"value: {' '.join(text.splitlines())}", "yaml")["value"]
    is_flow = isinstance(value, list | dict) and text[0] in "{["
    return value if is_flow or isinstance(value, str) else text


def _override(path: tuple[str, ...], text: str, origin: Origin) -> Override:
    try:
        value = check_plain(parse_value(text), path)
    except ConfigError as error:
        error.path = (*path, *error.path[1:]) if error.path[:1] == ("value",) else path
        if isinstance(error, ConfigSyntaxError):
            error.position = ""  # refers to the text that parse_value makes
        raise
    return Override(path, value, text, origin)
