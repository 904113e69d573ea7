"""Tests of tables, styles, escapes and JSON, in a terminal and in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.running import START, environment, run, run_in_terminal

from robo_orchard_lab.cli import output
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.cli.output import note, say, styled, table_lines

ROWS = [["a", "x", "one two three four five six seven"], ["long", "", "first\nsecond"]]


def test_a_plain_table_has_one_line_for_a_row() -> None:
    """Columns are aligned, nothing is truncated; only line ends of a text break a row."""
    assert table_lines(["name", "is", "about"], ROWS) == [
        "NAME  IS  ABOUT",
        "a     x   one two three four five six seven",
        "long      first",
        "          second",
    ]


def test_a_table_in_a_terminal_fits_its_width() -> None:
    """The last column wraps between words, and headings are bold."""
    code = "from robo_orchard_lab.cli.output import print_table\n"
    code += f"print_table(['name', 'is', 'about'], {ROWS!r})"
    ended = run_in_terminal(command=[sys.executable, "-c", code], columns=30)
    lines = [line.rstrip() for line in ended.out.splitlines()]
    assert lines[0].startswith("\x1b[1mNAME")
    assert lines[1:4] == [
        "a     x   one two three four",
        "          five six seven",
        "long      first",
    ]
    assert max(map(len, lines[1:])) <= 30


def test_a_table_in_a_terminal_does_not_need_rich(tmp_path: Path) -> None:
    """Without rich, a terminal gets plain rows under bold headings."""
    (tmp_path / "rich.py").write_text("raise ImportError('not installed')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from robo_orchard_lab.cli.output import print_table\n"
    code += f"print_table(['name', 'is', 'about'], {ROWS!r})"
    ended = run_in_terminal(command=[sys.executable, "-c", code], columns=30)
    assert ended.out.splitlines()[:2] == [
        "\x1b[1mNAME  IS  ABOUT\x1b[0m",
        "a     x   one two three four five six seven",
    ]


def test_a_table_without_rows_has_its_headings() -> None:
    """An empty table has headings."""
    assert table_lines(["name", "about"], []) == ["NAME  ABOUT"]


@pytest.mark.parametrize(
    ("variables", "has_styles"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_styles_are_for_terminals(variables: dict[str, str], has_styles: bool) -> None:
    """A terminal shows styles, unless NO_COLOR is set or the terminal cannot."""
    ended = run_in_terminal("completion", "csh", variables=variables)
    assert ended.code == 2
    assert ended.out.startswith("\x1b[31merror:\x1b[0m " if has_styles else "error: ")


def test_a_file_gets_no_styles() -> None:
    """Output to another program has no escape sequences."""
    ended = run("completion", "csh")
    assert ended.err.startswith("error: invalid value")


def test_control_characters_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Printed values and errors of a file have no control characters."""
    monkeypatch.chdir(tmp_path)
    main(["config", "init"])
    typed = ["--name", "a\x1b[31mred\u202ex", "--data.evaluation.v\x1b[1m=null"]
    assert table_lines(["is"], [[typed[1]]]) == ["IS", "a\\x1b[31mred\\u202ex"]
    capsys.readouterr()
    assert main(["config", "show", "experiment.yaml", "--origins", *typed[:2]]) == 0
    for format_ in ("yaml", "toml", "json"):
        assert main(["config", "show", "experiment.yaml", *typed[:2], "--format", format_]) == 0
    assert main(["config", "show", "experiment.yaml", typed[2]]) == 2
    shown = capsys.readouterr()
    assert "red" in shown.out
    assert not {"\x1b", "\u202e"} & {*shown.out, *shown.err}


def test_json_is_alone_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output of an imported module goes to standard error."""
    (tmp_path / "prints_much.py").write_text(
        "from robo_orchard_lab.pipeline.hooks.mixin import PipelineHooks\n"
        "print('much')\n"
        "class Mine(PipelineHooks):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["hooks", "show", "prints_much:Mine", "--trust", "prints_much", "--json"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["name"] == "prints_much:Mine"
    assert shown.err == "much\n"
    print("as before")
    assert capsys.readouterr().out == "as before\n"


def test_text_outside_the_output_encoding_is_escaped(tmp_path: Path) -> None:
    """Another encoding gets escapes, and a closed output is no error."""
    assert run("config", "init", cwd=tmp_path).code == 0
    arguments = ("config", "show", "experiment.yaml", "--name", "é")
    ended = run(*arguments, cwd=tmp_path, variables={"PYTHONIOENCODING": "ascii"})
    assert (ended.code, ended.out.splitlines()[0]) == (0, r'name: "\xe9"')
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *START, "--help"],
        env=environment(),
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (0, b"")


@pytest.mark.parametrize("print_line", [say, note])
def test_style_codes_in_text_are_escaped(
    print_line: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only styles of the program itself reach a terminal."""
    print_line("\x1b[31ma\x1b[0m\x1b]0;title\x07")
    shown = "".join(capsys.readouterr())
    assert shown == "\\x1b[31ma\\x1b[0m\\x1b]0;title\\x07\n"
    monkeypatch.setattr(output, "shows_style", lambda stream: True)
    print_line(styled("ok", "green") + "\x1b[8m\x1b[2J")
    shown = "".join(capsys.readouterr())
    assert shown == "\x1b[32mok\x1b[0m\\x1b[8m\\x1b[2J\n"
