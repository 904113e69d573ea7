"""Readers report the line number of each value."""

from __future__ import annotations

import pytest

from robo_orchard_core.utils.config import Format, formats
from robo_orchard_core.utils.config.formats import MAX_LINES, Lines

YAML = """\
a: 1
b:
  c:
    - 1
    - {x: 2}
"""
JSON = """\
{"a": 1,
 "b": {
  "c":
    [1,
     {"x": 2}]}}
"""
TOML = '''\
a = 1
[b]
text = """
x = 3
"""
c = [1,
  {x = 2}]
[[e.f]]
"a.b".c = 3 # [no.table]
[[ e . f ]]
[e.f.g]
'w' = 1
'''


@pytest.mark.parametrize(("format_", "text"), [("yaml", YAML), ("json", JSON)])
def test_yaml_and_json_report_the_line_of_each_value(format_: Format, text: str) -> None:
    """A value in a mapping has the line of its key."""
    lines: Lines = {}
    formats.read(text, format_, lines)
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "c", 1, "x"): 5,
    }


def test_toml_reports_lines_of_tables_and_settings() -> None:
    """Multi-line text and comments contain no settings."""
    lines: Lines = {}
    formats.read(TOML, "toml", lines)
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "text"): 3,
        ("b", "c"): 6,
        ("e", "f"): 8,
        ("e", "f", 0): 8,
        ("e", "f", 0, "a.b", "c"): 9,
        ("e", "f", 1): 10,
        ("e", "f", 1, "g"): 11,
        ("e", "f", 1, "g", "w"): 12,
    }


def test_json_that_is_not_yaml_has_no_lines() -> None:
    """Only the line numbers are missing."""
    lines: Lines = {}
    assert formats.read('{\n\t"a": {"b": 1}}', "json", lines) == {"a": {"b": 1}}
    long = "k" * 2000
    assert formats.read(f'{{"{long}": 1}}', "json", lines) == {long: 1}


@pytest.mark.parametrize(
    ("format_", "text"),
    [("yaml", "a: [{}]"), ("json", '{{"a": [{}]}}'), ("toml", "a = [{}]")],
)
def test_number_of_lines_is_bounded(format_: Format, text: str) -> None:
    """The number of recorded lines is limited."""
    lines: Lines = {}
    formats.read(text.format("1," * (MAX_LINES + 9) + "1"), format_, lines)
    assert len(lines) <= MAX_LINES
