"""Media that hooks attached to a run, for embedding in a page."""

from __future__ import annotations

import csv
from base64 import b64encode
from itertools import islice
from pathlib import Path
from typing import Any

from robo_orchard_lab.report.files import (
    Problems,
    inside,
    mapping,
    parse_json,
    read_bytes,
    read_lines,
    text,
    whole,
)

MEDIA = "media"
MAX_EMBEDDED_BYTES = 16 << 20
"""Bytes of all media of a page; of more, the newest are embedded."""
_MAX_ITEMS = 200
_MAX_ROWS = 500
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
    """Read media/index.jsonl and its files, the newest first; images and videos are embedded."""
    index = inside(folder, f"{MEDIA}/index.jsonl")
    if index is None:
        problems.add(f"{MEDIA} is a link out of the run folder, and is not read")
        return []
    by_file = {text(entry.get("file"), limit=300): entry for entry in read_lines(index, problems)}
    if len(by_file) > _MAX_ITEMS:
        problems.add(f"of {len(by_file):,} media, the newest {_MAX_ITEMS} are shown")
    found, rest = [], MAX_EMBEDDED_BYTES
    for file, entry in [*reversed(by_file.items())][:_MAX_ITEMS]:
        item: dict[str, Any] = {
            "name": text(entry.get("name"), "unnamed", 200),
            "step": whole(entry.get("step")),
            "kind": text(entry.get("kind"), "image", 20),
            "caption": text(entry.get("caption"), limit=1000),
        }
        data, path, own = None, inside(index.parent, file), Problems()
        if not file or path is None:
            item["problem"] = "the index names no file within the folder"
        elif (data := read_bytes(path, own, _MAX_FILE_BYTES)) is None:
            item["problem"] = own[0] if own else f"{file} is missing or can't be read"
        elif len(data) > rest:
            item["problem"] = f"{file} is not embedded: the page is large enough"
        else:
            rest -= len(data)
            item |= _content(item["kind"], data) or {"problem": f"{file} is no {item['kind']}"}
        item["file"] = file
        found.append(item)
    return found


def _content(kind: str, data: bytes) -> dict[str, Any] | None:
    """Return the content of a file for the page, or None if the file is of another kind."""
    try:
        if kind == "text":
            return {"text": text(data.decode(), limit=20_000)}
        if kind == "table":
            rows = [
                [text(cell, limit=500) for cell in row[:50]]
                for row in islice(csv.reader(data.decode().splitlines()), _MAX_ROWS)
            ]
            return {"columns": rows[0], "rows": rows[1:]} if rows else None
        if kind == "hyperparameters":
            values = [*mapping(parse_json(data)).items()][:_MAX_ROWS]
            rows = [[text(name, limit=200), text(value, "null", 500)] for name, value in values]
            return {"columns": ["name", "value"], "rows": rows}
    except (ValueError, csv.Error):
        return None
    if (found := media_type(data)) is None:
        return None
    # An animated PNG is an image to a browser.
    embedded = f"data:{found};base64,{b64encode(data).decode()}"
    item = {"kind": found.partition("/")[0], "data": embedded}
    # A browser shows the upper part of a cut image without an error.
    is_cut = found == "image/png" and b"IEND" not in data[-16:]
    return item | ({"problem": "the file is cut: its end is missing"} if is_cut else {})
