"""Media that hooks attached to a run, for embedding in a page."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.report.files import (
    Problems,
    items,
    mapping,
    read_bytes,
    read_lines,
    text,
    whole,
)

MEDIA = "media"
MAX_EMBEDDED_BYTES = 16 << 20
"""Bytes of all media of a page; of more, the newest are embedded."""
_MAX_ITEMS = 200
_MAX_FILE_BYTES = 8 << 20
_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"\x1aE\xdf\xa3": "video/webm",
}


def media_type(data: bytes) -> str | None:
    """Return the type of an image or video by its first bytes, or None.

    >>> media_type(b"GIF89a..."), media_type(b"<html>")
    ('image/gif', None)
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        return "video/mp4"
    return next((kind for start, kind in _TYPES.items() if data.startswith(start)), None)


def read_media(folder: Path, problems: Problems) -> list[dict[str, Any]]:
    """Read media/index.jsonl and embed its files, the newest first."""
    entries = [*read_lines(folder / MEDIA / "index.jsonl", problems)]
    if len(entries) > _MAX_ITEMS:
        problems.add(f"of {len(entries):,} media, the newest {_MAX_ITEMS} are shown")
    found, rest = [], MAX_EMBEDDED_BYTES
    for entry in reversed(entries[-_MAX_ITEMS:]):
        item: dict[str, Any] = {
            "name": text(entry.get("name"), "unnamed", 200),
            "step": whole(entry.get("step")),
            "kind": text(entry.get("kind"), "image", 20),
            "caption": text(entry.get("caption"), limit=1000),
            "file": text(entry.get("file"), limit=300),
            "data": None,
            "problem": "",
        }
        table = mapping(entry.get("table"))
        if item["kind"] == "table":
            item["columns"] = [text(c, limit=200) for c in items(table.get("columns"))[:50]]
            item["rows"] = [
                [text(cell, limit=500) for cell in items(row)[:50]]
                for row in items(table.get("rows"))[:500]
            ]
        elif path_problem(item["file"]) or not item["file"]:
            item["problem"] = "the index names no file within the folder"
        else:
            data = read_bytes(folder / MEDIA / item["file"], problems, _MAX_FILE_BYTES)
            kind = None if data is None else media_type(data)
            if data is None:
                item["problem"] = f"{item['file']} is missing or can't be read"
            elif kind is None:
                item["problem"] = f"{item['file']} is no image or video"
            elif len(data) > rest:
                item["problem"] = f"{item['file']} is not embedded: the page is large enough"
            else:
                rest -= len(data)
                item["kind"] = kind.partition("/")[0]
                item["data"] = f"data:{kind};base64,{b64encode(data).decode()}"
        found.append(item)
    return found
