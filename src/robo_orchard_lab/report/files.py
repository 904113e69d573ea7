"""Bounded, tolerant reading of the files of a run folder.

The readers of the pipeline import torch, and do not list what is damaged.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.untrusted_text import path_problem

MAX_JSON_BYTES = 16 << 20
MAX_LINE_BYTES = 4 << 20
MAX_LINES_BYTES = 4 << 30
_MAX_DEPTH = 40


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


def read_lines(
    path: Path, problems: Problems, accept: Callable[[bytes], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Iterate over the JSON objects of a file with one per line, also while the file grows.

    Damaged lines are skipped and counted in a problem; so is a last line that a crash cut.

    Args:
        path: the file.
        problems: receives the problems at the end.
        accept: filter of lines before they are parsed.
    """
    damaged, is_cut, size = 0, False, 0
    try:
        with open(open_regular(path), "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                size += len(line)
                if size > MAX_LINES_BYTES:
                    problems.add(f"of {path.name}, {MAX_LINES_BYTES >> 30} GiB are read")
                    break
                is_complete = line.endswith(b"\n")
                if not is_complete and len(line) == MAX_LINE_BYTES:
                    damaged += 1
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    continue
                if accept is not None and not accept(line):
                    continue
                try:
                    value = parse_json(line)
                    if not isinstance(value, dict):
                        raise ValueError("no object")
                except ValueError:
                    damaged, is_cut = damaged + is_complete, not is_complete
                    continue
                yield value
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        problems.add(f"{path.name} can't be read: {reason_of(error)}")
    if is_cut:
        problems.add(f"the last line of {path.name} is cut, as after a crash; it is left out")
    if damaged:
        lines = "a line" if damaged == 1 else f"{damaged:,} lines"
        problems.add(f"{lines} of {path.name} can't be read and are left out")


def text(value: Any, default: str = "", limit: int = 4000) -> str:
    """Return a value as bounded text that UTF-8 can encode; ``default`` for None."""
    if value is None:
        return default
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    found = found if len(found) <= limit else found[:limit] + " ..."
    return found.encode("utf-8", "replace").decode()


def whole(value: Any) -> int | None:
    """Return an int that JavaScript represents exactly, or None."""
    return value if type(value) is int and abs(value) < 2**53 else None


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping, or an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """Return a list, or an empty one."""
    return value if isinstance(value, list) else []
