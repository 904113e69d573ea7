"""Run a command of a page in a pseudo-terminal: its path, then the words of the command."""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
import termios
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":  # not in processes that a command spawns
    terminal = os.open(sys.argv[1], os.O_RDWR)
    with suppress(OSError):  # another rank has done so
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = sys.argv[2:]
    if sys.argv[0] == "robo-orchard-lab":
        from robo_orchard_lab.cli.main import main

        sys.exit(main())
    if not sys.argv[0].endswith(".py"):
        os.execvp(sys.argv[0], sys.argv)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
