"""Pages in Markdown whose blocks run: files, Python, and commands with their output.

| block | runs as |
|---|---|
| any, with a first line ``# name.yaml`` | file of this name |
| ``python`` | code in one namespace for the page; a ``text`` block right after it has its output |
| ``console`` | lines after ``$`` are commands in a terminal of 100 columns; output follows each |
| ``text``, ``yaml``, ``toml``, ``json``, ``mermaid`` | not at all |

Output is compared line by line: ``...`` stands for any text in a line, a line ``...`` for any
lines, and spaces for any number of spaces. Decimal numbers may differ by 2 %, clock times and
bars of a curve freely. A command has to succeed, unless its output has a line ``error: ...`` or the
next command is ``echo $?``.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import io
import math
import os
import pty
import re
import select
import shlex
import struct
import sys
import tempfile
import termios
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pyte
import torch

from fork_server import run_job
from launching import SCRIPTS, environment

_BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.M | re.S)
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
_DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?:e[+-]\d+)?(?![\d.])")
_LOOSE = {  # tokens of the expected output: what they match
    _DECIMAL: r"(\d+\.\d+(?:e[+-]\d+)?)",
    re.compile(r"\d+:\d\d(?::\d\d)?"): r"\d+:\d\d(?::\d\d)?",
    re.compile("[▁-█⠀-⣿]+"): "[▁-█⠀-⣿]+",
    re.compile(r"\s+"): r"[^\S\n]+",
}
_TOKEN = re.compile(rf"\.\.\.|{_DECIMAL.pattern}|\d+:\d\d(?::\d\d)?|[▁-█⠀-⣿]+|\s+|.")
_RATE = re.compile(
    r"(?<=e-\d\d {2}) *[\d,]+$|[\d,]+(?= samples/s)|\d+ \w+(?= ago)|now(?= +complete)"
)
_SHELL = set("|&;<>$`*~(")
_COLUMNS, _LONGEST_S = 100, 300
_FIRST_SEED = 67280421310721  # of torch in a new process


@dataclass
class Output:
    """Expected output in lines `begin` to `end` of a page, and the found output."""

    begin: int
    end: int
    expected: list[str]
    found: list[str]
    is_new: bool = False

    @property
    def is_expected(self) -> bool:
        return _matches(_stripped(self.expected), _stripped(self.found))

    def rewritten(self) -> list[str]:
        """Return the found lines; expected lines with wildcards stay where they match."""
        if self.is_expected:
            return self.expected
        known = [line for line in self.expected if line.strip() != "..."]
        lines = [
            next((each for each in known if _matches([each], [line])), _RATE.sub("...", line))
            for line in _stripped(self.found)
        ]
        return ["", "```text", *lines, "```"] if self.is_new else lines


def _matches(expected: list[str], found: list[str]) -> bool:
    match = re.fullmatch("".join(map(_line_pattern, expected)), "\n".join([*found, ""]))
    if match is None:
        return False
    numbers = [number for line in expected for number in _DECIMAL.findall(line)]
    pairs = zip(map(float, numbers), map(float, match.groups()), strict=True)
    return all(math.isclose(this, that, rel_tol=0.02) for this, that in pairs)


def _line_pattern(line: str) -> str:
    if line.strip() == "...":
        return r"(?:[^\n]*\n)*?"
    return "".join(map(_token_pattern, _TOKEN.findall(line))) + r"[^\S\n]*\n"


def _token_pattern(token: str) -> str:
    if token == "...":
        return r"[^\n]*?"
    for pattern, any_such in _LOOSE.items():
        if pattern.fullmatch(token):
            return any_such
    return re.escape(token)


def _stripped(lines: list[str]) -> list[str]:
    return "\n".join(map(str.rstrip, lines)).strip("\n").splitlines()


UNCHECKED = {"robot_data", "robot_learning", "rollouts"}
UNCHECKED |= {f"migrate_{name}" for name in ("accelerate", "lightning", "mmengine", "transformers")}
"""Pages whose blocks run in tests of their own, in tests/end_to_end."""


@dataclass
class Page:
    """A page that runs in a folder."""

    path: Path
    folder: Path
    outputs: list[Output] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.path.read_text("utf-8")
        self._variables = {
            name: value
            for name, value in environment().items()
            if name not in ("NO_COLOR", "COLUMNS", "LINES", "WORLD_SIZE", "RANK")
        } | {"TERM": "xterm-256color", "PATH": f"{self.folder.parent}/bin:{os.environ['PATH']}"}
        self._code = 0

    def run(self) -> None:
        """Run all blocks in order; `outputs` then has their outputs."""
        self._install()
        torch.manual_seed(_FIRST_SEED)
        blocks = [*_BLOCK.finditer(self.text)]
        with _main_module() as names, contextlib.chdir(self.folder):
            for block, following in zip_longest(blocks, blocks[1:]):
                line = self.text.count("\n", 0, block.start()) + 1
                if name := _FILE.match(block[3]):
                    target = self.folder / name[1]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(block[3], "utf-8")
                elif block[2] == "python":
                    self._run_python(block[3], line, names)
                    if following and not self.text[block.end() : following.start()].strip():
                        self._expect_text(following)
                elif block[2] == "console":
                    self._run_console(block[3], line)
                else:
                    allowed = ("text", "yaml", "toml", "json", "mermaid")
                    assert block[2] in allowed, f"{self.path}:{line}: {block[2]} does not run"

    def check(self) -> None:
        """Fail with the differences of expected and found output."""
        for output in self.outputs:
            difference = difflib.unified_diff(
                _stripped(output.expected),
                _stripped(output.found),
                "page",
                "run",
                lineterm="",
                n=99,
            )
            place = f"{self.path}:{output.begin + 1}"
            assert output.is_expected, "\n".join([place, *difference])

    def rewrite(self) -> None:
        """Write the found output into the page."""
        lines = self.text.splitlines()
        for output in reversed(self.outputs):
            lines[output.begin : output.end] = output.rewritten()
        self.path.write_text("\n".join(lines) + "\n", "utf-8")

    def _install(self) -> None:
        """Make the program available to shell commands, as by pip."""
        program = self.folder.parent / "bin/robo-orchard-lab"
        program.parent.mkdir()
        self.folder.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m robo_orchard_lab "$@"\n', "utf-8")
        program.chmod(0o755)

    def _run_python(self, code: str, line: int, names: dict[str, object]) -> None:
        printed = io.StringIO()
        compiled = compile("\n" * line + code, str(self.path), "exec")
        with contextlib.redirect_stdout(printed), _imports_from(self.folder):
            exec(compiled, names)  # noqa: S102  # of a page
        end = line + code.count("\n") + 1
        found = printed.getvalue().splitlines()
        self.outputs.append(Output(end, end, [], found, is_new=True))

    def _expect_text(self, block: re.Match[str]) -> None:
        if block[2] == "text":
            begin = self.text.count("\n", 0, block.start()) + 1
            lines = block[3].splitlines()
            found = self.outputs.pop().found
            self.outputs.append(Output(begin, begin + len(lines), lines, found))

    def _run_console(self, text: str, begin: int) -> None:
        lines = text.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[:1] == [0], f"{self.path}:{begin}: expected a console block to begin with $"
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            command, first = lines[start][2:], start + 1
            while command.endswith("\\"):
                command, first = command[:-1] + lines[first].strip(), first + 1
            found = self._run_command(command)
            self.outputs.append(Output(begin + first, begin + end, lines[first:end], found))
            is_error = any(line.startswith("error: ") for line in found)
            shows_code = end < len(lines) and lines[end] == "$ echo $?"
            place = f"{self.path}:{begin + start + 1}: {command} exits with {self._code}"
            assert is_error == bool(self._code) or shows_code, "\n".join([place, *found])

    def _run_command(self, command: str) -> list[str]:
        """Run a command in a terminal; return the lines that its screen shows at the end.

        The program and Python scripts run in forks, also for torchrun; other commands in a shell.
        """
        words = shlex.split(command)
        if words[0] == "export":
            self._variables |= dict([words[1].split("=", 1)])
            return []
        processes = 1
        if words[0] == "torchrun":
            processes = int(words[1].removeprefix("--nproc-per-node="))
            words[:2] = ["python"]
        if words[:3] == ["python", "-m", "robo_orchard_lab"]:
            words[:3] = ["robo-orchard-lab"]
        elif words[0] == "python" and words[1].endswith(".py"):
            del words[0]
        if _SHELL & set(command) or not (
            words[0].endswith(".py") or words[0] == "robo-orchard-lab"
        ):
            words = ["bash", "-c", f"(exit {self._code}); {command}"]
        with _Screen() as screen, tempfile.TemporaryDirectory() as output:
            codes = run_job(
                SCRIPTS / "page_command.py",
                [screen.terminal, *words],
                self._variables,
                processes,
                _LONGEST_S,
                Path(output),
                self.folder,
            )
        self._code = max(codes, key=abs)
        return screen.lines


class _Screen:
    """Pseudo-terminal whose output is drawn on a screen."""

    def __enter__(self) -> _Screen:
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, _COLUMNS, 0, 0))
        self.terminal = os.ttyname(self._theirs)
        # Wider than the program knows: its own long lines are not broken.
        self._screen = pyte.HistoryScreen(500, 50, history=100_000)
        self._is_done = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_done.set()
        self._reader.join()
        os.close(self._ours)
        os.close(self._theirs)
        above = ["".join(row[i].data for i in range(500)) for row in self._screen.history.top]
        self.lines = _stripped([*above, *self._screen.display])

    def _read(self) -> None:
        stream = pyte.ByteStream(self._screen)
        while (
            is_ready := select.select([self._ours], [], [], 0.05)[0]
        ) or not self._is_done.is_set():
            if is_ready:
                stream.feed(os.read(self._ours, 65536))


@contextlib.contextmanager
def _main_module() -> Iterator[dict[str, object]]:
    """Replace the module ``__main__``, for classes whose module is looked up."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    try:
        yield module.__dict__
    finally:
        sys.modules["__main__"] = before


@contextlib.contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Import modules of a folder, as a script in the folder does; forget them afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in [*sys.modules.items()]:
            if (getattr(module, "__file__", None) or "").startswith(f"{folder}/"):
                del sys.modules[name]
