"""Checks of text from untrusted files that becomes a path."""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath, PureWindowsPath

MAX_NAME_BYTES = 255
"""Bytes of one name in common file systems."""
_MAX_PATH_BYTES = 1024
_SPECIAL = frozenset('\\$?#*<>|"')  # of Windows, shells and URLs


def path_problem(path: str | PurePath) -> str | None:
    r"""Return why a relative path may leave its folder on any system, or None.

    Libraries give meaning to more than ``..``: ``~`` and ``$HOME``, backslashes, drives and URLs.

    >>> path_problem("best/model.safetensors"), path_problem("a\\..\\b")
    (None, "contains '..'")
    """
    text = str(path)
    if not text.isprintable():
        return "contains unprintable characters"
    for kind in (PurePosixPath, PureWindowsPath):
        parsed = kind(text)
        if parsed.root or parsed.drive:
            return "is absolute"
        if ".." in parsed.parts:
            return "contains '..'"
    if found := sorted(_SPECIAL.intersection(text)):
        return f"contains {found[0]}"
    if text.startswith("~") or ":/" in text:
        return "begins with ~" if text.startswith("~") else "is a URL"
    names = PurePosixPath(text).parts
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        return f"has a name of more than {MAX_NAME_BYTES} bytes"
    if len(text.encode()) > _MAX_PATH_BYTES:
        return f"has more than {_MAX_PATH_BYTES} bytes"
    return None
