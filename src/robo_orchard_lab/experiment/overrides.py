"""Single values of an experiment that are said outside of its file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robo_orchard_core.utils.config import formats, yaml_format
from robo_orchard_core.utils.config.document import Plain, check, check_text, parsed_path
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
)
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.experiment.provenance import Origin, listed, paths

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
            path = parsed_path(key)
            overrides.append(Override(path, check(value, path), None, origin))
        except ConfigError as error:
            raise _at(origin, error) from error.__cause__
    return overrides


def read_value(text: str) -> Plain:
    """What a value means that was typed: as in YAML, a scalar or a collection in flow style.

    What YAML would take for anything else, such as ``a: b``, ``*.bias`` or infinity, is text.

    >>> read_value("3"), read_value("[1, x]"), read_value("*.bias"), read_value("'3'")
    (3, [1, 'x'], '*.bias', '3')

    Raises:
        ConfigSyntaxError: A collection or a quotation that is broken, or too large.
    """
    text = text.strip()
    if len(text) > _MAX_TEXT:
        raise ConfigSyntaxError(f"the value is longer than {_MAX_TEXT} characters")
    check_text(text, ())
    if not text.startswith(("{", "[", '"', "'")):
        try:
            scalar = yaml_format.scalar(text)
        except ValueError:
            return text
        return text if isinstance(scalar, float) and not math.isfinite(scalar) else scalar
    # Only mappings are documents, so it is read as the value of one.
    value = formats.read(f"value: {' '.join(text.splitlines())}", "yaml")["value"]
    is_flow = isinstance(value, list | dict) and text[0] in "{["
    return value if is_flow or isinstance(value, str) else text


def _read(path: str, text: str, origin: Origin) -> Override:
    try:
        keys = parsed_path(path)
    except ConfigError as error:
        raise _at(origin, error) from None
    return _override(keys, text, origin)


def _override(path: tuple[str, ...], text: str, origin: Origin) -> Override:
    try:
        value = check(read_value(text), path)
    except ConfigError as error:
        error.path = (*path, *error.path[1:]) if error.path[:1] == ("value",) else path
        if isinstance(error, ConfigSyntaxError):
            error.position = ""  # of a text that is the value of a document here
        raise _at(origin, error) from error.__cause__
    return Override(path, value, text, origin)


def _at(origin: Origin, error: ConfigError) -> ConfigError:
    error.source = str(origin)
    return error
