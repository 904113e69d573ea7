"""Output of commands: text, styles, tables, JSON and YAML.

A terminal gets styles, and tables drawn by rich where it is installed; a file or another program
gets plain rows. Control characters in text from files are escaped.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import click

from robo_orchard_core.utils.config.formats import Plain, read_yaml, write_yaml

PROGRAM = "robo-orchard-lab"
DISTRIBUTION = "robo-orchard-hooks"
COMPLETE_VARIABLE = "_ROBO_ORCHARD_LAB_COMPLETE"

# --- text ------------------------------------------------------------------------------------

_STYLE_CODES = re.compile(r"(\x1b\[(?:0|1|31|32)m)")  # of `styled`


def say(text: str = "") -> None:
    """Print a line of the result to standard output."""
    print(_escaped(text, sys.stdout))


def note(text: str) -> None:
    """Print a line to standard error."""
    print(_escaped(text, sys.stderr), file=sys.stderr, flush=True)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return text in ``bold`` or a color if the stream (default: standard output) shows styles."""
    if not shows_style(stream or sys.stdout):
        return text
    return click.style(text, bold=True) if style == "bold" else click.style(text, fg=style)


def shows_style(stream: TextIO) -> bool:
    """Return True for a terminal with colors (https://no-color.org)."""
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not is_plain


def visible(text: str) -> str:
    r"""Return text with control and invisible characters escaped, except line ends.

    >>> visible("\x1b[31mred\nnext")
    '\\x1b[31mred\nnext'
    """
    if all(part.isprintable() for part in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _escaped(text: str, stream: TextIO) -> str:
    """Escape everything but the style codes of a stream with styles."""
    if not shows_style(stream):
        return visible(text)
    parts = enumerate(_STYLE_CODES.split(text))
    return "".join(part if number % 2 else visible(part) for number, part in parts)


def is_reader_gone() -> bool:
    """Return True if the reader of standard output ended, as after ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll, or no such stream
        return False


def discard_output() -> None:
    """Redirect standard output to the null device: buffered text causes no error at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


# --- tables ----------------------------------------------------------------------------------


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns under their headings.

    A terminal gets bold headings and, from rich, columns that fit its width. A file or another
    program gets each row as one line.
    """
    if sys.stdout.isatty():
        try:
            return _print_rich_table(headings, rows)
        except ImportError:  # of the extra `terminal`
            pass
    first, *others = table_lines(headings, rows)
    print(styled(first, "bold"), *others, sep="\n")
    return None


def _print_rich_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console(file=sys.stdout, highlight=False).print(table)


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a plain table; a cell of several lines takes several lines.

    >>> for line in table_lines(["hook", "does"], [["EMA", "averages"], ["FreezeHook", ""]]):
    ...     print(line)
    HOOK        DOES
    EMA         averages
    FreezeHook
    """
    cells = [[[heading.upper()] for heading in headings]]
    cells += [[visible(cell).splitlines() for cell in row] for row in rows]
    widths = [
        max(len(line) for cell in column for line in cell or [""])
        for column in zip(*cells, strict=True)
    ]
    lines = []
    for row in cells:
        for number in range(max(1, *map(len, row))):
            parts = [cell[number] if number < len(cell) else "" for cell in row]
            aligned = (f"{part:{width}}" for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(aligned).rstrip())
    return lines


# --- JSON ------------------------------------------------------------------------------------

_json_streams: list[TextIO] = []
"""Standard output of commands with ``--json``; meanwhile `sys.stdout` is standard error."""


def _start_json(context: click.Context, parameter: click.Parameter, is_set: bool) -> bool:
    if is_set and not context.resilient_parsing:
        context.with_resource(_only_json())
    return is_set


@contextmanager
def _only_json() -> Iterator[None]:
    """Redirect other output, for example of an imported module, to standard error."""
    _json_streams.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_streams.pop()


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_start_json,
    help="Print JSON to standard output and everything else to standard error.",
)
"""Option ``--json``, passed to the command as ``as_json``."""


def print_json(data: Any) -> None:
    """Print plain data as indented JSON to standard output."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if text != visible(text):
        text = json.dumps(data, indent=2)
    print(text, file=_json_streams[-1] if _json_streams else sys.stdout)


# --- amounts ---------------------------------------------------------------------------------

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def bytes_text(count: float) -> str:
    """Format a number of bytes.

    >>> bytes_text(512), bytes_text(1536), bytes_text(5 * 2**30)
    ('512 B', '1.5 KiB', '5.0 GiB')
    """
    unit = 0
    while count >= 1024 and unit < len(_BYTES) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_BYTES[unit]}" if unit else f"{count:.0f} B"


def age_text(seconds: float) -> str:
    """Format an age in its largest unit.

    >>> age_text(0.4), age_text(150), age_text(3 * 86400)
    ('now', '2 min ago', '3 d ago')
    """
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"


def count_text(count: int, noun: str) -> str:
    """Format a count with its unit.

    >>> count_text(1, "step"), count_text(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, length: int) -> str:
    """Return text of at most ``length`` characters.

    >>> shortened("robo_orchard_lab", 10)
    'robo_or...'
    """
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --- YAML ------------------------------------------------------------------------------------

_PLAIN = re.compile(
    r"""
    ((?:\s|-\s)*(?:\w+:\s)?)                                        # an item, or a key
    "((?:[A-Za-z_]|\d+\x20(?=[a-z]))                               # no number, and no sign
    (?:[\w./|+*-]|:(?=\w)|\x20(?=[\w|]))*)"(?=\n)
    """,
    re.ASCII | re.VERBOSE,
)
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # in YAML 1.1 and 1.2


def readable_yaml(document: dict[str, Plain]) -> str:
    """Return a document as block YAML with quotes only where they are needed.

    The text is parsed again to verify that it means the same.

    >>> print(readable_yaml({"every": "50 steps | 1 epoch", "mixed_precision": "no"}), end="")
    every: 50 steps | 1 epoch
    mixed_precision: "no"
    """
    exact = write_yaml(document)
    readable = with_escapes("".join(_unquoted(line) for line in exact.splitlines(keepends=True)))
    return readable if read_yaml(readable) == document else exact


def with_escapes(text: str) -> str:
    """Return YAML or TOML with escapes for control characters in its quoted strings."""
    return "".join(c if c.isprintable() or c == "\n" else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def _unquoted(line: str) -> str:
    found = _PLAIN.match(line)
    return line if found is None or found[2].lower() in _WORDS else f"{found[1]}{found[2]}\n"
