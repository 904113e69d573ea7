"""One document over another: what the upper one says counts, the rest stays.

Mappings merge key by key, in the order of the lower one; anything else is replaced. A mapping
that names another class or function than the one beneath it replaces it whole, since its other
keys are that one's arguments. `null` removes an entry that users give a name to: a hook, an
evaluation set, a parameter group.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from robo_orchard_core.utils.config import formats
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    Path,
    parse_path,
)
from robo_orchard_core.utils.config.formats import Plain, check_plain, check_utf8
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
    return merge_with_origins((beneath, {}), (above, {}))[0]


def merge_with_origins(
    beneath: tuple[dict[str, Plain], Origins], above: tuple[dict[str, Plain], Origins]
) -> tuple[dict[str, Plain], Origins]:
    """The same for documents whose values have origins."""
    merger = _Merger(beneath[1], above[1])
    return merger.mapping(beneath[0], above[0], ()), merger.origins


def names_other_code(beneath: dict[str, Plain], above: dict[str, Plain]) -> bool:
    """Whether ``above`` is for other code than ``beneath``, where both name some."""
    old, new = (
        {key: part[key] for key in PART_KEYS if part.get(key) is not None}
        for part in (beneath, above)
    )
    return bool(old) and any(old.get(key) != name for key, name in new.items())


def paths(value: Plain, path: Path = ()) -> Iterator[Path]:
    """The paths of a value and of all that it holds."""
    return (inner for inner, _ in walk(value, path))


def walk(value: Plain, path: Path = ()) -> Iterator[tuple[Path, Plain]]:
    """A value and all that it holds, each with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


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
        if isinstance(beneath, dict) and not names_other_code(beneath, above):
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


ENVIRONMENT_PREFIX = "ROBO_ORCHARD_LAB__"

_OPTION = re.compile(r'(?:"(?:[^"\\]|\\.)*+"|[^"=])*+(?==|\Z)')
_MAX_TEXT = 2**16


@dataclass(frozen=True)
class Override:
    """One value, and where in the document it goes.

    Attributes:
        path: The keys from the top; the index of a list's item as text.
        value: What the text was read as: a scalar of YAML, or a collection in flow style.
        text: The value as typed; None from code, which has values instead of text.
        origin: Who said it.
    """

    path: tuple[str, ...]
    value: Plain
    text: str | None
    origin: Origin

    @property
    def names_code(self) -> bool:
        """Whether it says which class or function something is."""
        return any(key in PART_KEYS for *_, key in paths(self.value, self.path))


def from_arguments(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides among the arguments of a command, and the other arguments.

    >>> overrides, rest = from_arguments(["a.yaml", "--seed", "3", "--hooks.stats=null"])
    >>> [(o.path, o.value) for o in overrides], rest
    ([(('seed',), 3), (('hooks', 'stats'), None)], ['a.yaml'])

    Args:
        arguments: Each that begins with two dashes is an override, ``--path value`` or
            ``--path=value``, up to an argument of just two dashes.

    Raises:
        ConfigError: A path isn't written as one, or has no value.
    """
    overrides: list[Override] = []
    rest: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        if argument == "--":
            rest += reversed(waiting)
            break
        if not argument.startswith("--"):
            rest.append(argument)
            continue
        option, has_value, text = _option(argument)
        origin = Origin("command line", option)
        if not has_value:
            if not waiting or waiting[-1].startswith("--"):
                raise _at(origin, ConfigFieldError(f"expected a value, as in {option}=VALUE"))
            text = waiting.pop()
        overrides.append(_read(option.removeprefix("--"), text, origin))
    return overrides, rest


def _option(argument: str) -> tuple[str, bool, str]:
    """The option, whether a value follows in the same argument, and the value."""
    # An equals sign within a quoted key belongs to the key.
    match = _OPTION.match(argument)
    end = match.end() if match else argument.find("=")
    if argument[end : end + 1] != "=":
        return argument, False, ""
    return argument[:end], True, argument[end + 1 :]


def from_environment(environ: Mapping[str, str], document: Mapping[str, Plain]) -> list[Override]:
    """The overrides among environment variables, such as ``ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH``.

    >>> environ = {"ROBO_ORCHARD_LAB__HOOKS__STATS__EVERY": "50 steps", "PATH": "/bin"}
    >>> [override] = from_environment(environ, {"hooks": {"Stats": {}}})
    >>> override.path, override.value
    (('hooks', 'Stats', 'every'), '50 steps')

    Args:
        environ: All variables; those without the prefix don't count.
        document: Whose keys they mean, in whatever case; a key that isn't there yet is taken to be
            in lower case.

    Raises:
        ConfigError: A variable has an empty key, or one that fits two keys of the document.
    """
    overrides = []
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            origin = Origin("environment", name)
            try:
                path = _path_of_variable(name.removeprefix(ENVIRONMENT_PREFIX), document)
            except ConfigError as error:
                raise _at(origin, error) from None
            overrides.append(_override(path, environ[name], origin))
    return overrides


def _path_of_variable(levels: str, document: Plain | Mapping[str, Plain]) -> tuple[str, ...]:
    path: tuple[str, ...] = ()
    inside: object = document
    for level in levels.split("__"):
        if not level:
            raise ConfigFieldError(
                f"expected keys between two underscores each, as in {ENVIRONMENT_PREFIX}"
                "TRAINER__MAX_EPOCH; found an empty one",
                path,
            )
        keys = [*inside] if isinstance(inside, Mapping) else []
        same = [key for key in keys if key.lower() == level.lower()]
        if len(same) > 1 and level not in same:
            raise ConfigFieldError(
                f"{level!r} may be any of {listed(same)}; say it on the command line", path
            )
        key = level if level in same else same[0] if same else level.lower()
        path = (*path, key)
        inside = _inside(inside, key)
    return path


def _inside(value: object, key: str) -> object:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        return value[int(key)]
    return None


def from_mapping(values: Mapping[str, object]) -> list[Override]:
    """The overrides that code gives as a mapping of dotted paths, or as a nested one.

    >>> [o.path for o in from_mapping({"trainer.max_epoch": 3, "data": {"train": {}}})]
    [('trainer', 'max_epoch'), ('data',)]

    Raises:
        ConfigError: A path isn't written as one, or a value is no plain data.
    """
    origin = Origin("code", "overrides=")
    overrides = []
    for key, value in values.items():
        try:
            path = parse_path(key)
            overrides.append(Override(path, check_plain(value, path), None, origin))
        except ConfigError as error:
            raise _at(origin, error) from error.__cause__
    return overrides


def parse_value(text: str) -> Plain:
    """What a value means that was typed: as in YAML, a scalar or a collection in flow style.

    What YAML would take for anything else, such as ``a: b``, ``*.bias`` or infinity, is text.

    >>> parse_value("3"), parse_value("[1, x]"), parse_value("*.bias"), parse_value("'3'")
    (3, [1, 'x'], '*.bias', '3')

    Raises:
        ConfigSyntaxError: A collection or a quotation that is broken, or too large.
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
    # Only mappings are documents, so it is read as the value of one.
    value = formats.read(f"value: {' '.join(text.splitlines())}", "yaml")["value"]
    is_flow = isinstance(value, list | dict) and text[0] in "{["
    return value if is_flow or isinstance(value, str) else text


def _read(path: str, text: str, origin: Origin) -> Override:
    try:
        keys = parse_path(path)
    except ConfigError as error:
        raise _at(origin, error) from None
    return _override(keys, text, origin)


def _override(path: tuple[str, ...], text: str, origin: Origin) -> Override:
    try:
        value = check_plain(parse_value(text), path)
    except ConfigError as error:
        error.path = (*path, *error.path[1:]) if error.path[:1] == ("value",) else path
        if isinstance(error, ConfigSyntaxError):
            error.position = ""  # of a text that is the value of a document here
        raise _at(origin, error) from error.__cause__
    return Override(path, value, text, origin)


def _at(origin: Origin, error: ConfigError) -> ConfigError:
    error.source = str(origin)
    return error
