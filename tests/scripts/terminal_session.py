"""Run the command line in a pseudo-terminal with an emulated screen, and print what it shows.

The argument is JSON: `arguments` of the program, `columns`, `rows`, `variables` of the environment,
and optionally `until`, a pattern of the screen's text, and `press`, the keys to press then.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from typing import Any

import pyte

LONGEST_S = 100


def lines_of(screen: pyte.HistoryScreen) -> list[str]:
    """Return all lines, also those above the screen, without empty ones at the end."""
    above = ["".join(row[i].data for i in range(screen.columns)) for row in screen.history.top]
    lines = [line.rstrip() for line in (*above, *screen.display)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def watch(pid: int, terminal: int, order: dict[str, Any]) -> dict[str, Any]:
    """Show the output of a process on a screen until it ends."""
    screen = pyte.HistoryScreen(order["columns"], order["rows"], history=1000)
    stream, written = pyte.ByteStream(screen), b""
    found: list[str] = []
    ends_at = time.monotonic() + LONGEST_S
    while select.select([terminal], [], [], max(0.0, ends_at - time.monotonic()))[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # on Linux, the other end is closed
            break
        written += part
        stream.feed(part)
        if not found and "until" in order and re.search(order["until"], "\n".join(screen.display)):
            found = lines_of(screen)
            os.write(terminal, order.get("press", "").encode())
    else:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": code, "found": found, "lines": lines_of(screen), "written": written.decode()}


order = json.loads(sys.argv[1])
pid, terminal = pty.fork()
if pid:
    print(json.dumps(watch(pid, terminal, order)))
else:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", order["rows"], order["columns"], 0, 0))
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update({"TERM": "xterm-256color", **order["variables"]})
    from robo_orchard_lab.cli.main import main

    sys.exit(main(order["arguments"]))
