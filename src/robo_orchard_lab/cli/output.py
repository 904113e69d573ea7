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
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import zip_longest
from typing import Any, TextIO

import click

from robo_orchard_core.utils.config.formats import Plain, write_yaml
from robo_orchard_core.utils.logging import visible

PROGRAM = "robo-orchard-lab"
DISTRIBUTION = "robo-orchard-hooks"
COMPLETE_VARIABLE = "_ROBO_ORCHARD_LAB_COMPLETE"


_STYLE_CODES = re.compile(r"(\x1b\[(?:0|1|31|32)m)")  # of `styled`


def say(text: str = "", *, flush: bool = False) -> None:
    """Print a line of the result to standard output."""
    _print(text, sys.stdout, flush=flush)


def note(text: str) -> None:
    """Print a line to standard error."""
    _print(text, sys.stderr, flush=True)


def _print(text: str, stream: TextIO, *, flush: bool) -> None:
    """Print a line, escaped except for the style codes of a stream with styles."""
    parts = _STYLE_CODES.split(text) if shows_style(stream) else [text]
    shown = (part if number % 2 else visible(part) for number, part in enumerate(parts))
    print("".join(shown), file=stream, flush=flush)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return text in ``bold`` or a color if the stream (default: standard output) shows styles."""
    if not shows_style(stream or sys.stdout):
        return text
    return click.style(text, bold=True) if style == "bold" else click.style(text, fg=style)


def shows_style(stream: TextIO) -> bool:
    """Return True for a terminal with colors (https://no-color.org)."""
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not is_plain


def is_watched() -> bool:
    """Return True if standard error is a terminal, and the process is not one of a job."""
    return sys.stderr is not None and sys.stderr.isatty() and "WORLD_SIZE" not in os.environ


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


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns under their headings.

    A terminal gets bold headings and, from rich, columns that fit its width. A file or another
    program gets each row as one line.
    """
    if sys.stdout.isatty():
        with suppress(ImportError):  # rich is in the extra `terminal`
            return _print_rich_table(headings, rows)
    first, *others = table_lines(headings, rows)
    print(styled(first, "bold"), *others, sep="\n")
    return None


def print_rich(renderable: object) -> None:
    """Print an object by rich in a terminal; its ``str`` elsewhere, or without rich."""
    if sys.stdout.isatty():
        with suppress(ImportError):  # rich is in the extra `terminal`
            from rich.console import Console

            return Console(file=sys.stdout, highlight=False).print(renderable)
    say(str(renderable))
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
    lines: list[Sequence[str]] = [[heading.upper() for heading in headings]]
    for row in rows:
        lines += zip_longest(*(visible(cell).splitlines() or [""] for cell in row), fillvalue="")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (map(str.ljust, line, widths) for line in lines)
    return ["  ".join(line).rstrip() for line in aligned]


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


_BYTES = ("KiB", "MiB", "GiB", "TiB")
_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def bytes_text(count: float) -> str:
    """Format a number of bytes.

    >>> bytes_text(512), bytes_text(1536), bytes_text(5 * 2**30)
    ('512 B', '1.5 KiB', '5.0 GiB')
    """
    text = f"{count:.0f} B"
    for unit in _BYTES:
        if count < 1024:
            break
        count /= 1024
        text = f"{count:.1f} {unit}"
    return text


def age_text(seconds: float) -> str:
    """Format an age in its largest unit.

    >>> age_text(0.4), age_text(150), age_text(3 * 86400)
    ('now', '2 min ago', '3 d ago')
    """
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"


def duration_text(seconds: float | None) -> str:
    """Format a duration in its two largest units.

    >>> duration_text(7.26), duration_text(150), duration_text(7300)
    ('7 s', '2 min 30 s', '2 h 1 min')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count_text(count: int, noun: str) -> str:
    """Format a count with its unit.

    >>> count_text(1, "step"), count_text(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


_PLAIN = re.compile(
    r"(?!(?i:null|true|false|yes|no|on|off|y|n)\Z)"  # no word of YAML 1.1 and 1.2
    r"(?:[A-Za-z_]|\d+\x20(?=[a-z]))"  # no number, and no sign
    r"(?:[\w./|+*-]|:(?=\w)|\x20(?=[\w|]))*",
    re.ASCII,
)


def readable_yaml(document: dict[str, Plain]) -> str:
    """Return a document as block YAML with quotes only where they are needed.

    >>> print(readable_yaml({"every": "50 steps | 1 epoch", "mixed_precision": "no"}), end="")
    every: 50 steps | 1 epoch
    mixed_precision: "no"
    """
    return with_escapes(write_yaml(document, is_plain=_PLAIN.fullmatch))


def with_escapes(text: str) -> str:
    """Return YAML or TOML with escapes for control characters in its quoted strings."""
    return "".join(
        c if c.isprintable() or c == "\n" else f"\\u{n:04x}" if n < 2**16 else f"\\U{n:08x}"
        for c, n in zip(text, map(ord, text), strict=True)
    )
