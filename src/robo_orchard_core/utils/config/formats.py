"""Documents as JSON, YAML and TOML text.

A document is plain data: None, bool, int, finite float, text, and lists and dicts with text keys.
`write` reads its own result back, so that a written document is never a different one.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any, Literal, TypeAlias, cast, get_args

from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigSaveError,
    ConfigSyntaxError,
    Path,
)
from robo_orchard_core.utils.strict_json import JsonError, check_json, check_scalar, parse_json

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
Format = Literal["json", "yaml", "toml"]
Lines: TypeAlias = dict[Path, int]
"""Line number, from 1, of each value or its key, by path."""

MAX_DEPTH = 64
"""Nested lists and dicts in a document; far below the interpreter's recursion limit."""
MAX_BYTES = 16 * 2**20
"""Size of a document in UTF-8. Larger data belongs in a file of its own."""
MAX_LINES = 20_000
"""Values whose line numbers a reader records."""

_FORMATS: dict[str, Format] = {".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def format_of(path: str | os.PathLike[str]) -> Format:
    """Return the format for a file name's suffix."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ConfigError(f"expected a file name that ends in {known}; found {os.fspath(path)!r}")
    return _FORMATS[suffix]


def check_format(name: str) -> Format:
    """Return `name`, checked to be the name of a format."""
    if name not in (known := get_args(Format)):
        raise ConfigError(f"expected a format out of {known}, found {name!r}")
    return cast("Format", name)


def write(document: dict[str, Plain], format: Format) -> str:  # noqa: A002 - the public word
    """Serialize a document and verify that `read` returns the identical document.

    Raises:
        ConfigSaveError: With the path of a value that the format can't hold.
    """
    text: str = _WRITERS[check_format(format)](document)
    try:
        difference = first_difference(document, read(text, format))
    except ConfigSyntaxError as error:
        raise ConfigSaveError(f"{format} can't hold this: {error.problem}", error.path) from error
    if difference is not None:
        raise ConfigSaveError(f"{format} can't hold this value exactly", difference)
    return text


def read(
    text: str,
    format: Format,  # noqa: A002 - the public word
    lines: Lines | None = None,
) -> dict[str, Plain]:
    """Parse a document.

    Args:
        text: The document.
        format: Format of the text.
        lines: Filled with the line number of each value, as far as the parser reports lines.

    Raises:
        ConfigSyntaxError: The text is malformed, too large, or holds anything but plain data.
    """
    reader = _READERS[check_format(format)]
    check_utf8(text, ())  # a lone surrogate crashes libyaml's parser
    if len(text.encode()) > MAX_BYTES:
        raise ConfigSyntaxError(f"the document is larger than {MAX_BYTES} bytes")
    document = check_plain(reader(text, lines))
    if not isinstance(document, dict):
        found = type(document).__qualname__
        raise ConfigSyntaxError(f"expected a mapping of fields at the top, found {found}")
    return document


def decode_utf8(content: bytes) -> str:
    """Decode the content of a document's file."""
    if len(content) > MAX_BYTES:
        raise ConfigSyntaxError(f"the document is larger than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigSyntaxError(f"expected UTF-8: {error}") from error


def check_plain(value: object, path: Path = ()) -> Plain:
    """Return a copy of plain data, with TOML's dates and times as ISO 8601 text."""
    try:
        plain: Plain = check_json(value, MAX_DEPTH, _plain_scalar, len(path))
        return plain
    except JsonError as error:
        raise _syntax_error(error, path) from error.__cause__


def _plain_scalar(value: Any) -> Plain:
    match value:
        case None | bool() | float():
            plain: Plain = check_scalar(value)
            return plain
        case str() | int():
            try:
                text = str(value)
                text.encode()
            except UnicodeEncodeError as error:
                problem = f"text can't hold the lone surrogate {text[error.start]!r}"
                raise JsonError(problem) from error
            except ValueError as error:  # more digits than Python converts to text and back
                raise JsonError(str(error)) from error
            return value
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            found = type(value).__qualname__
            raise JsonError(f"expected plain data, found an instance of {found}")


def check_utf8(text: str, path: Path) -> None:
    """Refuse text with half of a surrogate pair."""
    try:
        _plain_scalar(text)
    except JsonError as error:
        raise _syntax_error(error, path) from error.__cause__


def _syntax_error(error: JsonError, path: Path = ()) -> ConfigSyntaxError:
    # The first keys of a path as deep as the limit are enough.
    inner = error.path if len(error.path) < MAX_DEPTH else error.path[:8]
    return ConfigSyntaxError(error.problem, (*path, *inner), error.position)


def first_difference(left: Any, right: Any, path: Path = ()) -> Path | None:
    """Return the path of the first difference in type, value, key order or sign of zero."""
    if type(left) is not type(right):
        return path
    if not isinstance(left, dict | list):
        return None if repr(left) == repr(right) else path  # distinguishes -0.0 from 0.0
    keys, others = ([*v] if isinstance(v, dict) else [*range(len(v))] for v in (left, right))
    if keys != others:
        return path
    found = (first_difference(left[key], right[key], (*path, key)) for key in keys)
    return next(filter(None, found), None)


def write_json(document: dict[str, Plain]) -> str:
    """Return indented JSON without a final newline, so that a truncated file is malformed."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def read_json(text: str, lines: Lines | None = None) -> Any:
    """Parse strict JSON; see `read`."""
    try:
        value = parse_json(text, max_depth=MAX_DEPTH)
    except JsonError as error:
        raise _syntax_error(error) from error
    if lines is not None:
        # Python's parser reports no lines; YAML's does, and nearly all JSON is YAML.
        with suppress(ConfigSyntaxError):
            read_yaml(text, lines)
    return value


# The core schema of YAML 1.2 without tags and aliases: `on`, `yes` and `12:30` are text, 1e-3 is a
# number. PyYAML is imported on demand, since its import is slow.

_INTEGER = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    spelling: value
    for word, value in (("", None), ("~", None), ("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_BARE_WORD = re.compile(r"(?!(?i:null|true|false|yes|no|on|off|y|n)\Z)[A-Za-z_][A-Za-z0-9_]*")


def write_yaml(
    document: dict[str, Plain], *, is_plain: Callable[[str], object] = lambda text: False
) -> str:
    """Return block-style YAML for readers of any YAML version.

    All text is in double quotes, except for keys that are plain words, and text for which
    ``is_plain`` is true.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = None if is_plain(value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def mapping(dumper: yaml.SafeDumper, value: dict[str, Plain]) -> yaml.MappingNode:
        node = dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=not value)
        for key, _ in node.value:
            key.style = None if _BARE_WORD.fullmatch(key.value) else '"'
        return node

    Dumper.add_representer(str, text)
    Dumper.add_representer(dict, mapping)
    dumped: str = yaml.dump(
        document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return dumped


def read_yaml_scalar(text: str) -> Plain:
    """Parse an unquoted scalar by the core schema of YAML 1.2 (section 10.3).

    >>> read_yaml_scalar("1e-3"), read_yaml_scalar("50 steps"), read_yaml_scalar("null")
    (0.001, '50 steps', None)

    Raises:
        ValueError: The number is not finite, or has more digits than Python converts.
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


def read_yaml(text: str, lines: Lines | None = None) -> Any:
    """Parse YAML without tags and aliases; see `read`."""
    import yaml

    loader = _yaml_loader()(text, lines)
    try:
        node = loader.get_single_node()
        return None if node is None else _from_node(node, ())
    except yaml.YAMLError as error:
        problem, position = " ".join(str(error).split()), ""
        if isinstance(error, yaml.MarkedYAMLError):
            problem = " ".join(filter(None, (error.context, error.problem)))
            position = _position(error.problem_mark)
        raise ConfigSyntaxError(f"broken YAML: {problem}", position=position) from error
    finally:
        loader.dispose()


@cache
def _yaml_loader() -> Any:
    import yaml
    from yaml.composer import Composer

    # Python composes nodes from the events of libyaml, ten times faster than Python's own parser.
    parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(Composer, parser):  # type: ignore[misc]  # a class chosen at run time
        """SafeLoader that refuses tags, aliases, nested keys and deep nesting."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the base class

        def __init__(self, stream: str, lines: Lines | None) -> None:
            parser.__init__(self, stream)
            Composer.__init__(self)
            self.path: Path = ()
            self.lines = lines

        def compose_node(self, parent: Any, index: Any) -> Any:
            event, above = self.peek_event(), self.path
            is_key = isinstance(parent, yaml.MappingNode) and index is None
            if parent is not None and not is_key:
                self.path = (*above, getattr(index, "value", index))
                if self.lines is not None and len(self.lines) < MAX_LINES:
                    mark = getattr(index, "start_mark", event.start_mark)  # of the key, if any
                    self.lines.setdefault(self.path, mark.line + 1)
            if isinstance(event, yaml.AliasEvent):
                self._refuse("YAML aliases are not read; write the value out", event)
            if event.tag is not None:
                self._refuse("YAML tags are not read; write plain data", event)
            if not isinstance(event, yaml.ScalarEvent):
                if is_key:
                    self._refuse("expected a key of text, found a collection", event)
                if len(self.path) >= MAX_DEPTH:
                    self.path = self.path[:8]
                    self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
            node = super().compose_node(parent, index)
            self.path = above
            return node

        def _refuse(self, problem: str, event: Any) -> None:
            raise ConfigSyntaxError(problem, self.path, _position(event.start_mark))

    return Loader


def _position(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _from_node(node: Any, path: Path) -> Plain:
    """Convert a YAML node to plain data; aliases and tags were refused before."""
    if node.id == "sequence":
        return [_from_node(item, (*path, i)) for i, item in enumerate(node.value)]
    if node.id == "scalar":
        try:
            return node.value if node.style else read_yaml_scalar(node.value)
        except ValueError as error:
            raise ConfigSyntaxError(str(error), path, _position(node.start_mark)) from error
    mapping: dict[str, Plain] = {}
    for key_node, value_node in node.value:
        key = _from_node(key_node, path)
        position = _position(key_node.start_mark)
        if not isinstance(key, str):
            problem = f"expected a key of text, found {key!r}; quote it"
            raise ConfigSyntaxError(problem, path, position)
        if key in mapping:
            problem = "the key occurs twice in one mapping; keep one of the two"
            raise ConfigSyntaxError(problem, (*path, key), position)
        mapping[key] = _from_node(value_node, (*path, key))
    return mapping


# The writer is our own, since the order of keys is a part of a document: hooks run in order. TOML
# has no null, so the inline table {__none__ = true} encodes None.

_NONE = {"__none__": True}
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# Unterminated text extends to the point where the parser stops. Otherwise a file of quotes would
# take minutes.
_QUOTED = re.compile(
    r'''"""(?:[^\\]|\\.)*?(?:"{3,5}|\\?\Z)|'{3}.*?(?:'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]|\\[^\n])*+"?|'[^'\n]*'?|\#[^\n]*""",
    re.DOTALL,
)
_DEEP_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"")[ \t]*\.[ \t]*){{{MAX_DEPTH}}}""")
_KEY = r"""(?:[\w-]++|"(?:[^"\\]|\\.)*+"|'[^']*+')"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*+"
_TOML_LINE = re.compile(
    rf"[ \t]*(?:(?P<brackets>\[\[?)[ \t]*(?P<table>{_DOTTED})[ \t]*\]"
    rf"|(?P<setting>{_DOTTED})[ \t]*=)"
)


def write_toml(document: dict[str, Plain]) -> str:
    """Return TOML with keys and tables in the order of the document."""
    return "\n".join(_table(document, ())).strip("\n") + "\n"


def _table(table: dict[str, Plain], path: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table.

    TOML can't return to a table's values after a sub-table. So only tables after the last plain
    value get a section; earlier tables are written inline.
    """
    items = list(table.items())
    split = len(items)
    while split and _is_section(items[split - 1][1]):
        split -= 1
    for key, value in items[:split]:
        yield f"{_toml_key(key)} = {_inline(value)}"
    for key, value in items[split:]:
        header = ".".join(map(_toml_key, (*path, key)))
        for entry in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            assert isinstance(entry, dict)  # see _is_section
            yield from _table(entry, (*path, key))


def _is_section(value: Plain) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(i, dict) for i in value)
    return isinstance(value, dict)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _inline(key)


def _inline(value: Plain) -> str:
    match value:
        case None:
            return _inline(dict(_NONE))
        case bool() | str():
            # A JSON string is a TOML basic string, except for DEL, which TOML requires escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
        case int() | float():
            return repr(value)
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case _:
            pairs = (f"{_toml_key(key)} = {_inline(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"


def read_toml(text: str, lines: Lines | None = None) -> Any:
    """Parse TOML 1.0; see `read`."""
    # tomllib's memory grows with the square of a dotted key's length.
    if _DEEP_KEY.search(_QUOTED.sub('""', text)):
        raise ConfigSyntaxError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = _restore_none(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        # The message ends with "(at line 3, column 5)", or "(at end of document)".
        problem, _, at = str(error).removesuffix(")").rpartition(" (at ")
        number = int(at.split()[1].rstrip(",")) if "line" in at else len(text.splitlines())
        path: Path = ()
        with suppress(tomllib.TOMLDecodeError):
            path = next((path for line, path in _toml_settings(text) if line == number), ())
        keys = tuple(key for key in path if isinstance(key, str))
        raise ConfigSyntaxError(f"broken TOML: {problem}", keys, at) from error
    except RecursionError:
        raise ConfigSyntaxError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigSyntaxError(f"broken TOML: {error}") from error
    if lines is not None:
        for line, path in islice(_toml_settings(text), MAX_LINES):
            lines.setdefault(path, line)
    return value


def _toml_settings(text: str) -> Iterator[tuple[int, Path]]:
    """Yield line number and path of each table header and setting."""
    table: Path = ()
    last_index: dict[Path, int] = {}  # by path of an array of tables

    def path_of(above: Path, keys: Path) -> Path:
        for key in keys:
            above = (*above, key)
            if above in last_index:
                above = (*above, last_index[above])
        return above

    def on_one_line(quoted: re.Match[str]) -> str:
        newlines = quoted[0].count("\n")
        return '""' + newlines * "\n" if newlines else quoted[0]

    for number, line in enumerate(_QUOTED.sub(on_one_line, text).split("\n"), 1):
        if (match := _TOML_LINE.match(line)) is None:
            continue
        keys = _split_toml_key(match["table"] or match["setting"])
        if match["setting"]:
            yield number, path_of(table, keys)
        elif match["brackets"] == "[[":
            array = (*path_of((), keys[:-1]), keys[-1])
            last_index[array] = last_index.get(array, -1) + 1
            yield number, array
            table = (*array, last_index[array])
            yield number, table
        else:
            table = path_of((), keys)
            yield number, table


def _split_toml_key(text: str) -> tuple[str, ...]:
    inside: object = tomllib.loads(f"{text} = 0")
    keys: list[str] = []
    while isinstance(inside, dict):
        ((key, inside),) = inside.items()
        keys.append(key)
    return tuple(keys)


def _restore_none(value: object) -> object:
    if isinstance(value, list):
        return [_restore_none(item) for item in value]
    if isinstance(value, dict):
        if value == _NONE:
            return None
        return {key: _restore_none(item) for key, item in value.items()}
    return value


_READERS: dict[Format, Callable[[str, Lines | None], Any]] = {
    "json": read_json,
    "yaml": read_yaml,
    "toml": read_toml,
}
_WRITERS = {"json": write_json, "yaml": write_yaml, "toml": write_toml}
