"""What goes to standard output: text and tables that suit a terminal and a file, or JSON."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, TextIO

import click

from robo_orchard_core.utils.config.formats import Plain, read_yaml, write_yaml

# --- names -----------------------------------------------------------------------------------
# What the command line goes by.


PROGRAM = "robo-orchard-lab"
DISTRIBUTION = "robo-orchard-hooks"
COMPLETE_VARIABLE = "_ROBO_ORCHARD_LAB_COMPLETE"


# --- output ----------------------------------------------------------------------------------


Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]

_CODES: dict[Style, int] = {
    "bold": 1,
    "dim": 2,
    "red": 31,
    "green": 32,
    "yellow": 33,
    "cyan": 36,
}
_STYLES = re.compile(rf"(\x1b\[(?:0|{'|'.join(map(str, _CODES.values()))})m)")
_GAP = "  "
_NARROWEST = 20  # of the last column, below which it is left to the terminal to break lines

_for_json: list[TextIO] = []  # where JSON goes while sys.stdout is standard error


def _keep_for_json(context: click.Context, parameter: click.Parameter, wanted: bool) -> bool:
    if wanted and not context.resilient_parsing:
        context.with_resource(_output_aside())
    return wanted


@contextmanager
def _output_aside() -> Iterator[None]:
    """Have what others print, such as a module of the user's, go to standard error."""
    _for_json.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _for_json.pop()


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_keep_for_json,
    help="Print JSON to standard output, and nothing else there.",
)
"""``--json``, which a command that prints a table gets as ``as_json``.

All that is printed by other means than `print_json` then goes to standard error.
"""


def say(text: str = "") -> None:
    """Print a line that was asked for, which may have styles, and nothing else to be obeyed."""
    print(_with_styles(text, sys.stdout))


def note(text: str) -> None:
    """Print a line to standard error, which is no part of what was asked for."""
    print(_with_styles(text, sys.stderr), file=sys.stderr, flush=True)


def _with_styles(text: str, stream: TextIO) -> str:
    """The text, made visible but for styles of ours where they show."""
    if not shows_style(stream):
        return visible(text)
    return "".join(
        part if number % 2 else visible(part) for number, part in enumerate(_STYLES.split(text))
    )


def print_json(data: Any) -> None:
    """Print plain data as JSON, indented, to what was standard output when the command began."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if text != visible(text):
        text = json.dumps(data, indent=2)
    print(text, file=_for_json[-1] if _for_json else sys.stdout)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows beneath their headings, in columns.

    In a terminal the last column is broken where the line ends, and the headings are bold; a file
    or another program gets each row as one line.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    first, *others = table_lines(headings, rows, width)
    print(styled(first, "bold"))
    for line in others:
        print(line)


def table_lines(
    headings: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None
) -> list[str]:
    """The lines of a table, the headings' first.

    >>> for line in table_lines(["hook", "does"], [["EMA", "averages"], ["FreezeHook", ""]]):
    ...     print(line)
    HOOK        DOES
    EMA         averages
    FreezeHook

    Args:
        headings: of the columns.
        rows: with a text for each column; lines within a text stay lines.
        width: at which lines of the last column are broken; None breaks none.
    """
    whole = [[heading.upper() for heading in headings], *([*map(visible, row)] for row in rows)]
    widths = [
        max(len(line) for row in whole for line in row[column].splitlines() or [""])
        for column in range(len(headings))
    ]
    left = sum(widths[:-1]) + len(_GAP) * (len(headings) - 1)
    if width is not None and width - left >= _NARROWEST:
        whole = [[*row[:-1], _broken(row[-1], width - left)] for row in whole]
    return [line for row in whole for line in _row_lines(row, widths)]


def visible(text: str) -> str:
    r"""The text with escapes for what a terminal would obey or hide; lines stay lines.

    >>> visible("\x1b[31mred\nnext")
    '\\x1b[31mred\nnext'
    """
    if all(part.isprintable() for part in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _broken(text: str, width: int) -> str:
    return "\n".join(
        part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]
    )


def _row_lines(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    cells = [cell.splitlines() for cell in row]
    for number in range(max(1, *(len(cell) for cell in cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        yield _GAP.join(f"{part:{w}}" for part, w in zip(parts, widths, strict=True)).rstrip()


def styled(text: str, style: Style, stream: TextIO | None = None) -> str:
    """The text in a style, where the stream (default: standard output) shows any."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if shows_style(stream or sys.stdout) else text


def shows_style(stream: TextIO) -> bool:
    """Whether it is a terminal of somebody who doesn't mind colours (https://no-color.org)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as behind ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # there is no poll, or no such stream
        return False


def discard_output() -> None:
    """Have what is left to be written to standard output go nowhere, without an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


# --- amounts ---------------------------------------------------------------------------------
# Numbers of bytes, seconds and things, as people read them.


_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def bytes_text(count: float) -> str:
    """A number of bytes.

    >>> bytes_text(512), bytes_text(1536), bytes_text(5 * 2**30)
    ('512 B', '1.5 KiB', '5.0 GiB')
    """
    unit = 0
    while count >= 1024 and unit < len(_BYTES) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_BYTES[unit]}" if unit else f"{count:.0f} B"


def age_text(seconds: float) -> str:
    """How long ago something was, in its largest unit.

    >>> age_text(0.4), age_text(150), age_text(3 * 86400)
    ('now', '2 min ago', '3 d ago')
    """
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"


def count_text(count: int, thing: str) -> str:
    """So many things.

    >>> count_text(1, "step"), count_text(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


# --- readable yaml ---------------------------------------------------------------------------
# YAML for people: text without quotes, where it means the same.


_PLAIN = re.compile(
    r"""
    ((?:\s|-\s)*(?:\w+:\s)?)                                        # an item, or a key
    "((?:[A-Za-z_]|\d+\x20(?=[a-z]))                               # no number, and no sign
    (?:[\w./|+*-]|:(?=\w)|\x20(?=[\w|]))*)"(?=\n)
    """,
    re.ASCII | re.VERBOSE,
)
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # of YAML, old and new


def readable_yaml(document: dict[str, Plain]) -> str:
    """The document in block style; it is read back before it is handed out.

    >>> print(readable_yaml({"every": "50 steps | 1 epoch", "mixed_precision": "no"}), end="")
    every: 50 steps | 1 epoch
    mixed_precision: "no"
    """
    exact = write_yaml(document)
    readable = with_escapes("".join(_bare(line) for line in exact.splitlines(keepends=True)))
    return readable if read_yaml(readable) == document else exact


def with_escapes(text: str) -> str:
    """YAML or TOML whose quoted texts have escapes for what a terminal would obey or hide."""
    return "".join(c if c.isprintable() or c == "\n" else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def _bare(line: str) -> str:
    found = _PLAIN.match(line)
    return line if found is None or found[2].lower() in _WORDS else f"{found[1]}{found[2]}\n"
