"""Bounded, tolerant reading of the files of a run folder.

The readers of the pipeline import torch, and do not list what is damaged.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from robo_orchard_core.utils.untrusted_text import path_problem

MAX_JSON_BYTES = 16 << 20
MAX_LINE_BYTES = 4 << 20
MAX_LINES_BYTES = 4 << 30
_MAX_DEPTH = 40
_BLOCK_BYTES = 1 << 20
_COMPARED_BYTES = 256


class Problems(list[str]):
    """Descriptions of what could not be read, for people."""

    def add(self, text: str) -> None:
        """Add a description, once."""
        if text not in self:
            self.append(text)


def inside(folder: Path, path: str) -> Path | None:
    """Return the path in a folder; None if ``..`` or a link leads out.

    >>> inside(Path("run"), "media/a.png"), inside(Path("run"), "../a.png")
    (PosixPath('run/media/a.png'), None)
    """
    found = folder / path
    root = os.path.realpath(folder)
    is_inside = Path(os.path.realpath(found.parent)).is_relative_to(root)
    return found if is_inside and not path_problem(path) else None


def open_regular(path: Path) -> int:
    """Open a regular file and return its descriptor; no link is followed, no pipe waits.

    Raises:
        OSError: the file is missing, unreadable, a link, or not a regular file.
    """
    names = ("NOFOLLOW", "NONBLOCK", "CLOEXEC", "BINARY")
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in names))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return descriptor


def read_bytes(path: Path, problems: Problems, limit: int = MAX_JSON_BYTES) -> bytes | None:
    """Read a file; None if missing, and with a problem if unreadable or too large."""
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        problems.add(f"{path.name} can't be read: {reason_of(error)}")
        return None
    if len(data) > limit:
        problems.add(f"{path.name} has more than {limit >> 20} MiB and is not read")
        return None
    return data


def reason_of(error: Exception) -> str:
    """Return the reason of an error without its path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def parse_json(data: bytes) -> Any:
    """Parse JSON of bounded depth.

    Raises:
        ValueError: the data is no such JSON.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check_depth(value, _MAX_DEPTH)
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                _check_depth(item, depth - 1)


def read_object(path: Path, problems: Problems) -> dict[str, Any]:
    """Read a JSON object; empty if missing, and with a problem if damaged."""
    data = read_bytes(path, problems)
    if data is None:
        return {}
    with suppress(ValueError):
        value = parse_json(data)
        if isinstance(value, dict):
            return value
    problems.add(f"{path.name} is damaged: no JSON object")
    return {}


class LineReader:
    """Reader of a file with a JSON object per line that resumes where it stopped.

    Damaged lines are skipped and counted, and so is a last line that a crash cut. A file that was
    replaced, became shorter or has other bytes before the position is read from its start.

    Args:
        path: the file, which may grow.
        mark: bytes that a line must contain; other lines are not parsed.
        follow: leave an incomplete last line for the next read.
    """

    def __init__(self, path: Path, mark: bytes = b"", *, follow: bool = False) -> None:
        self.path = path
        self.restarted = False
        """True if the last read began at the start of the file."""
        self._mark = mark
        self._follow = follow
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""  # the last bytes up to the offset
        self._damaged = 0
        self._is_cut = False

    def read(self, problems: Problems) -> Iterator[dict[str, Any]]:
        """Iterate over the objects that were added since the last read; add problems at the end."""
        name = self.path.name
        try:
            with open(open_regular(self.path), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                self.restarted = (found.st_dev, found.st_ino) != self._identity
                self.restarted |= found.st_size < self._offset
                file.seek(self._offset - len(self._before))
                # Bytes differ after a resumed run has cut the file and written on.
                self.restarted |= file.read(len(self._before)) != self._before
                if self.restarted:
                    self._identity = found.st_dev, found.st_ino
                    self._offset, self._before, self._damaged = 0, b"", 0
                self._is_cut = False
                file.seek(self._offset)
                for line in self._lines(file, problems):
                    try:
                        value = parse_json(line)
                        if not isinstance(value, dict):
                            raise ValueError("no object")
                    except ValueError:
                        is_complete = line.endswith(b"\n")
                        self._damaged += is_complete
                        self._is_cut = not is_complete
                        continue
                    yield value
        except FileNotFoundError:
            self.restarted, self._identity = self._identity is not None, None
            self._offset, self._before, self._damaged = 0, b"", 0
            return
        except (OSError, ValueError) as error:
            problems.add(f"{name} can't be read: {reason_of(error)}")
        if self._is_cut:
            problems.add(f"the last line of {name} is cut, as after a crash; it is left out")
        if self._damaged:
            one = f"a line of {name} can't be read and is left out"
            lines = f"{self._damaged:,} lines of {name} can't be read and are left out"
            problems.add(one if self._damaged == 1 else lines)

    def _lines(self, file: IO[bytes], problems: Problems) -> Iterator[bytes]:
        """Iterate over the lines with the mark, from blocks: most have none."""
        rest, is_too_long = b"", False
        while block := file.read(_BLOCK_BYTES):
            if self._offset > MAX_LINES_BYTES:
                problems.add(f"of {self.path.name}, {MAX_LINES_BYTES >> 30} GiB are read")
                return
            block = rest + block
            at, end = 0, block.rfind(b"\n") + 1
            if is_too_long and end:
                at, is_too_long = block.index(b"\n") + 1, False
            while at < end and (at := block.find(self._mark, at, end)) >= 0:
                begin, at = block.rfind(b"\n", 0, at) + 1, block.index(b"\n", at) + 1
                yield block[begin:at]
            rest = block[end:]
            self._offset += end
            self._before = block[max(0, end - _COMPARED_BYTES) : end] or self._before
            if len(rest) > MAX_LINE_BYTES or is_too_long:
                self._damaged += not is_too_long
                self._offset += len(rest)
                self._before = b""
                rest, is_too_long = b"", True
        if rest and not self._follow and self._mark in rest:
            yield rest


def read_lines(path: Path, problems: Problems, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """Iterate over the JSON objects of a file with one per line; see `LineReader`."""
    return LineReader(path, mark).read(problems)


def text(value: Any, default: str = "", limit: int = 4000) -> str:
    """Return a value as bounded text that UTF-8 can encode; ``default`` for None."""
    if value is None:
        return default
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    found = found if len(found) <= limit else found[:limit] + " ..."
    return found.encode("utf-8", "replace").decode()


def utc_time(value: Any) -> str | None:
    """Return a time as ISO text in UTC, or None."""
    with suppress(ValueError, TypeError, OverflowError):
        found = datetime.fromisoformat(value)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        return found.isoformat(timespec="seconds")
    return None


def whole(value: Any) -> int | None:
    """Return a value that is an int and exact in JavaScript, else None."""
    return value if type(value) is int and abs(value) < 2**53 else None


def mapping(value: Any) -> dict[str, Any]:
    """Return a value that is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """Return a value that is a list, else an empty list."""
    return value if isinstance(value, list) else []
