"""Documents as YAML: the data part of YAML 1.2, built from the parser's events.

The events are read here, and not by PyYAML's constructors, because those build the whole graph
before anyone can look at it: a tag would already have been obeyed and an alias expanded. So tags
and aliases are refused where they stand, depth is bounded while reading, and plain scalars mean
what YAML 1.2 says: ``on``, ``yes`` and ``12:30`` are text, ``1e-3`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from robo_orchard_core.utils.config.document import (
    MAX_DEPTH,
    MAX_LINES,
    Lines,
    Plain,
    RepeatedKey,
)
from robo_orchard_core.utils.config.errors import ConfigSyntaxError, Path

if TYPE_CHECKING:
    import yaml

_INTEGER = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    spelling: value
    for word, value in (("", None), ("~", None), ("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}


def write(document: dict[str, Plain]) -> str:
    """Block style; all text in double quotes, so that no reader of any YAML takes ``on`` for True.

    Keys that are plain words in every version of YAML stay bare.
    """
    # Imported where it is used: it takes longer than the rest of the package together.
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"')

    def mapping(dumper: yaml.SafeDumper, value: dict[str, Plain]) -> yaml.MappingNode:
        node = dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=not value)
        for key, _ in node.value:
            key.style = None if _is_bare_key(key.value) else '"'
        return node

    Dumper.add_representer(str, text)
    Dumper.add_representer(dict, mapping)
    dumped: str = yaml.dump(
        document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return dumped


def _is_bare_key(key: str) -> bool:
    reserved = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) is not None and key.lower() not in reserved


def scalar(text: str) -> Plain:
    """What the text means without quotes, by the core schema of YAML 1.2 (its section 10.3).

    >>> scalar("1e-3"), scalar("50 steps"), scalar("null")
    (0.001, '50 steps', None)

    Raises:
        ValueError: It says infinity or no number, or has more digits than Python converts.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"expected a finite number, found {text}")
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def read(text: str, lines: Lines | None = None) -> object:
    """What the text says; the caller checks it with `document.check`.

    Args:
        text: The document.
        lines: Is given the line of each value, by its path.

    Raises:
        ConfigSyntaxError: The text is no YAML, or holds a tag, an alias or a second document,
            or nests too deep.
    """
    import yaml

    # libyaml where PyYAML was built with it: ten times faster, the same events.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Reader(yaml.parse(text, Loader=loader), lines).document()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        position = _position(error.problem_mark)
        raise ConfigSyntaxError(f"broken YAML: {problem}", position=position) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigSyntaxError(f"broken YAML: {problem}") from error


def _position(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _refused(problem: str, path: Path, event: yaml.Event) -> ConfigSyntaxError:
    return ConfigSyntaxError(problem, path, _position(event.start_mark))


class _Reader:
    """Plain data out of a stream of events, one value for each call of `_value`."""

    def __init__(self, events: Iterator[yaml.Event], lines: Lines | None) -> None:
        self._events = events
        self._lines = lines

    def document(self) -> Plain:
        import yaml

        next(self._events)  # the start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), ())
        next(self._events)  # the end of the document
        extra = next(self._events)
        if not isinstance(extra, yaml.StreamEndEvent):
            raise _refused("expected one YAML document, found a second one", (), extra)
        return value

    def _value(self, event: yaml.Event, path: Path) -> Plain:
        import yaml

        self._note(path, event)
        if isinstance(event, yaml.AliasEvent):
            raise _refused("YAML aliases are not read; write the value out", path, event)
        if getattr(event, "tag", None) is not None:
            raise _refused("YAML tags are not read; write plain data", path, event)
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else _scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _refused(
                f"the document is nested deeper than {MAX_DEPTH} levels", path[:8], event
            )
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        return self._mapping(path)

    def _note(self, path: Path, event: yaml.Event) -> None:
        mark = event.start_mark
        if self._lines is not None and path and mark and len(self._lines) < MAX_LINES:
            self._lines.setdefault(path, mark.line + 1)

    def _list(self, path: Path) -> list[Plain]:
        import yaml

        items: list[Plain] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Plain]:
        import yaml

        mapping: dict[str, Plain] = {}
        repeated: RepeatedKey | None = None
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            # Not looked into: keys within keys would be levels that nobody counts.
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                raise _refused("expected a key of text, found a collection", path, event)
            key = self._value(event, path)
            if not isinstance(key, str):
                raise _refused(f"expected a key of text, found {key!r}; quote it", path, event)
            if key in mapping:
                repeated = repeated or RepeatedKey(key)
            self._note((*path, key), event)
            mapping[key] = self._value(next(self._events), (*path, key))
        return mapping if repeated is None else repeated


def _scalar(event: yaml.ScalarEvent, path: Path) -> Plain:
    try:
        return scalar(event.value)
    except ValueError as error:
        raise _refused(str(error), path, event) from error
