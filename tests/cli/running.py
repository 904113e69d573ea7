"""Ways to run the command line: in another process, with or without a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "import sys; from robo_orchard_lab.cli.main import main; sys.exit(main())"
"""Code of the installed ``robo-orchard-lab``."""

START = [sys.executable, "-P", "-c", PROGRAM]  # -P: scripts have their own folder ahead, not this
LONGEST_S = 120
Variables = Mapping[str, str]
EMPTY: Variables = {}
_LEFT_OUT = ("NO_COLOR", "COLUMNS", "TERM", "WORLD_SIZE", "RANK")


@dataclass(frozen=True)
class Ended:
    """Result of a command."""

    code: int
    out: str
    err: str = ""


def environment(variables: Variables = EMPTY) -> dict[str, str]:
    """Return this process's environment with these variables, without variables for output."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return {**kept, **variables}


def run_module(*arguments: str, cwd: Path) -> Ended:
    """The program as ``python -m robo_orchard_lab``."""
    return _ended([sys.executable, "-m", "robo_orchard_lab", *arguments], cwd, EMPTY)


def run(*arguments: str, cwd: Path | None = None, variables: Variables = EMPTY) -> Ended:
    """Start the program in a separate process with piped output."""
    return _ended([*START, *arguments], cwd, variables)


def _ended(command: list[str], cwd: Path | None, variables: Variables) -> Ended:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_in_terminal(
    *arguments: str,
    cwd: Path | None = None,
    columns: int = 100,
    variables: Variables = EMPTY,
    command: Sequence[str] = (),
) -> Ended:
    """The program in a terminal, which shows both of its outputs."""
    ours, its = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    started = subprocess.Popen(
        [*(command or START), *arguments],
        cwd=cwd,
        env=environment({**size, **variables}),
        stdin=its,
        stdout=its,
        stderr=its,
        close_fds=True,
    )
    os.close(its)
    shown = b""
    while select.select([ours], [], [], LONGEST_S)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # its end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return Ended(started.wait(LONGEST_S), shown.decode().replace("\r\n", "\n"))
