"""A program in a pseudo-terminal of a given size, whose screen a test reads."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

LONGEST_S = 60.0
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """Pseudo-terminal with a program in its foreground; ends the program when the body exits."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], size: tuple[int, int]
    ) -> None:
        self._ours, its = pty.openpty()
        self.output = ""
        self.resize(*size)
        kept = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command],
            env={"TERM": "xterm-256color", **kept},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(its)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Type keys; Ctrl-C is ``\\x03``."""
        os.write(self._ours, keys.encode())

    @property
    def screen(self) -> list[str]:
        """Lines of the last complete picture, without codes."""
        pictures = self.output.split("\x1b[H")
        return [
            _CODES.sub("", line) for line in pictures[-2 if len(pictures) > 2 else -1].split("\r\n")
        ]

    def wait_for(self, is_shown: Callable[[list[str]], bool]) -> list[str]:
        """Read until the screen fulfills a condition; return the screen."""
        ends_at = time.monotonic() + LONGEST_S
        while not is_shown(self.screen):
            assert time.monotonic() < ends_at, "\n".join(self.screen)
            assert self._read(1.0) or self.process.poll() is None, self.output[-2000:]
        return self.screen

    def wait(self) -> int:
        """Read until the program ends; return its exit code."""
        ends_at = time.monotonic() + LONGEST_S
        while self._read(1.0) or self.process.poll() is None:
            assert time.monotonic() < ends_at
        return self.process.wait()

    def _read(self, seconds: float) -> bool:
        with suppress(OSError):  # the other end is closed
            if select.select([self._ours], [], [], seconds)[0] and (
                data := os.read(self._ours, 65536)
            ):
                self.output += data.decode("utf-8", "replace")
                return True
        return False

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
