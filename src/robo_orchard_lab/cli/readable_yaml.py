"""YAML for people: text without quotes, where it means the same."""

from __future__ import annotations

import re

from robo_orchard_core.utils.config.document import Plain
from robo_orchard_core.utils.config.yaml_format import read, write

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
    exact = write(document)
    readable = with_escapes("".join(_bare(line) for line in exact.splitlines(keepends=True)))
    return readable if read(readable) == document else exact


def with_escapes(text: str) -> str:
    """YAML or TOML whose quoted texts have escapes for what a terminal would obey or hide."""
    return "".join(c if c.isprintable() or c == "\n" else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def _bare(line: str) -> str:
    found = _PLAIN.match(line)
    return line if found is None or found[2].lower() in _WORDS else f"{found[1]}{found[2]}\n"
