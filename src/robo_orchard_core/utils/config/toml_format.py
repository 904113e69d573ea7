"""Documents as TOML 1.0.

The writer is our own, since the order of keys is part of a document (hooks run in theirs) and
a writer that moves tables behind plain values would change it. TOML has no null: None is written
as the inline table ``{__none__ = true}``, which nothing else is written as.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator

from robo_orchard_core.utils.config.document import MAX_DEPTH, MAX_LINES, Lines, Plain
from robo_orchard_core.utils.config.errors import ConfigSyntaxError, Path

NONE = {"__none__": True}
"""What stands for None."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# One that doesn't end goes on to where the parser gives up, or a file of quotes would take minutes.
_QUOTED = re.compile(
    r'''"""(?:[^\\]|\\.)*?(?:"{3,5}|\\?\Z)|'{3}.*?(?:'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]|\\[^\n])*+"?|'[^'\n]*'?|\#[^\n]*""",
    re.DOTALL,
)
_DEEP_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"")[ \t]*\.[ \t]*){{{MAX_DEPTH}}}""")
_PART = r"""(?:[\w-]++|"(?:[^"\\]|\\.)*+"|'[^']*+')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*+"
_LINE = re.compile(
    rf"[ \t]*(?:(?P<brackets>\[\[?)[ \t]*(?P<table>{_DOTTED})[ \t]*\]"
    rf"|(?P<setting>{_DOTTED})[ \t]*=)"
)
_HEADER = re.compile(r"\s*\[")
_POSITION = re.compile(r"(.*) \(at (line \d+, column \d+|end of document)\)", re.DOTALL)


def write(document: dict[str, Plain]) -> str:
    """Plain values first where they stand first, then tables, all in the document's order."""
    return "\n".join(_table(document, ())).strip("\n") + "\n"


def _table(table: dict[str, Plain], path: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table.

    Once a sub-table has begun, TOML has no way back to its parent's values; so only the tables
    after the last plain value get a section of their own, and earlier ones are written inline.
    """
    items = list(table.items())
    sections = 0
    while sections < len(items) and _is_section(items[-1 - sections][1]):
        sections += 1
    split = len(items) - sections
    for key, value in items[:split]:
        yield f"{_key(key)} = {_inline(value)}"
    for key, value in items[split:]:
        header = ".".join(map(_key, (*path, key)))
        for entry in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            assert isinstance(entry, dict)  # or it were no section
            yield from _table(entry, (*path, key))


def _is_section(value: Plain) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(i, dict) for i in value)
    return isinstance(value, dict)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _inline(value: Plain) -> str:
    match value:
        case None:
            return _inline(dict(NONE))
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case _:
            pairs = (f"{_key(key)} = {_inline(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"


def read(text: str, lines: Lines | None = None) -> object:
    """What the text says; the caller checks it with `document.check`.

    Args:
        text: The document.
        lines: Is given the line of each value that has a line of its own, by its path.

    Raises:
        ConfigSyntaxError: The text is no TOML (repeated keys included), or is nested too deep.
    """
    # tomllib spends memory on the square of a dotted key's length: 100 kB of them fill a machine.
    if _DEEP_KEY.search(_QUOTED.sub('""', text)):
        raise ConfigSyntaxError(f"the document is nested deeper than {MAX_DEPTH} levels")
    try:
        value = _with_none(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        found = _POSITION.fullmatch(str(error))
        problem, position = found.groups() if found else (str(error), "")
        raise ConfigSyntaxError(
            f"broken TOML: {problem}", _path_at(text, position), position
        ) from error
    except RecursionError:
        raise ConfigSyntaxError("the document is nested too deep to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigSyntaxError(f"broken TOML: {error}") from error
    if lines is not None:
        lines.update(_lines(text))
    return value


def _lines(text: str) -> Lines:
    """Where tables and settings stand; the parser doesn't tell."""
    lines: Lines = {}
    table: Path = ()
    entries: dict[Path, int] = {}  # of arrays of tables, the index of the last

    def path_of(above: Path, keys: Path) -> Path:
        for key in keys:
            above = (*above, key)
            if above in entries:
                above = (*above, entries[above])
        return above

    for number, line in enumerate(_QUOTED.sub(_in_one_line, text).split("\n"), 1):
        if (match := _LINE.match(line)) is None:
            continue
        if len(lines) == MAX_LINES:
            break
        keys = _keys(match["table"] or match["setting"])
        if match["setting"]:
            path = path_of(table, keys)
        elif match["brackets"] == "[[":
            array = (*path_of((), keys[:-1]), keys[-1])
            entries[array] = entries.get(array, -1) + 1
            lines.setdefault(array, number)
            path = table = (*array, entries[array])
        else:
            path = table = path_of((), keys)
        lines.setdefault(path, number)
    return lines


def _in_one_line(text: re.Match[str]) -> str:
    """A text of several lines as an empty one that is followed by as many ends of lines."""
    newlines = text[0].count("\n")
    return '""' + newlines * "\n" if newlines else text[0]


def _keys(text: str) -> tuple[str, ...]:
    """The keys of a dotted key."""
    inside: object = tomllib.loads(f"{text} = 0")
    keys: list[str] = []
    while isinstance(inside, dict):
        ((key, inside),) = inside.items()
        keys.append(key)
    return tuple(keys)


def _path_at(text: str, position: str) -> Path:
    """The key that is set in the line of an error; empty where the line sets none."""
    numbers = re.findall(r"\d+", position)
    lines = text.splitlines()[: int(numbers[0]) if numbers else None]
    header = next((line for line in reversed(lines) if _HEADER.match(line)), "")
    setting = "" if not lines or lines[-1] == header else f"{lines[-1].partition('=')[0]} = 0"
    path: list[str] = []
    for part in (header, setting):
        try:
            inside: object = tomllib.loads(part)
        except tomllib.TOMLDecodeError:
            break
        while inside and isinstance(inside, dict | list):
            if isinstance(inside, list):
                inside = inside[0]
            else:
                key, inside = next(iter(inside.items()))
                path.append(key)
    return tuple(path)


def _with_none(value: object) -> object:
    if isinstance(value, list):
        return [_with_none(item) for item in value]
    if isinstance(value, dict):
        if value == NONE:
            return None
        return {key: _with_none(item) for key, item in value.items()}
    return value
