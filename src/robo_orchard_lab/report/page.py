"""HTML page of a run, or of several runs for comparison: one self-contained file."""

from __future__ import annotations

import html
import json
import os
import uuid
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from robo_orchard_lab.report.files import text
from robo_orchard_lab.report.series import MAX_POINTS
from robo_orchard_lab.report.story import differing, read_story

REPORT_FILE = "report.html"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript><p>{title}. This page draws its curves and tables with JavaScript.</p></noscript>
<main id="page"></main>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """Further table of a page, with a text below, such as a command."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def render(
    folders: Sequence[Path],
    *,
    sort: str | None = None,
    title: str | None = None,
    tables: Sequence[Table] = (),
) -> str:
    """Return the page of one run, or the comparison of several.

    Args:
        folders: run folders.
        sort: metric that sorts a comparison.
        title: title of a comparison; by default the names of the runs.
        tables: tables to show before the comparison.
    """
    return to_html(*read_document(folders, sort=sort, title=title, tables=tables))


def read_document(
    folders: Sequence[Path],
    *,
    sort: str | None = None,
    title: str | None = None,
    tables: Sequence[Table] = (),
) -> tuple[str, str]:
    """Return title and data of the page of runs, see `render`; HTML can embed the data."""
    runs = [read_story(folder, MAX_POINTS // len(folders)) for folder in folders]
    data: dict[str, Any] = {
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "tables": [asdict(table) for table in tables],
    }
    heading: str = runs[0]["name"]
    if len(runs) > 1 or tables:
        paths = [os.path.abspath(folder) for folder in folders]
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        for run, path in zip(runs, paths, strict=True):
            run["name"] = text(os.path.relpath(path, common), limit=200)
        data["differences"] = [{"path": path, "values": v} for path, v in differing(runs)]
        data["sort"] = sort
        heading = title or f"Comparison: {' · '.join(run['name'] for run in runs)}"
        data["title"] = text(title or "Comparison of runs", limit=200)
    return heading, embeddable(data)


def embeddable(data: Any) -> str:
    """Return data as JSON without characters that end a script or a line of it."""
    document = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        document = document.replace(character, f"\\u{ord(character):04x}")
    return document


SCRIPTS = ("uPlot.iife.min.js", "page.js")
LIVE_SCRIPTS = (*SCRIPTS, "live.js")
LIST_SCRIPTS = ("runs.js",)


def to_html(title: str, document: str, scripts: Sequence[str] = SCRIPTS) -> str:
    """Return the page of data.

    Text of the runs is in the page's data alone, and the page's scripts show it as text.

    Args:
        title: title of the page.
        document: data, see `embeddable`.
        scripts: names of the page's scripts.
    """
    return _PAGE.format(
        policy=content_policy(scripts),
        title=html.escape(title[:200]),
        style=_style(),
        data=document,
        scripts="\n".join(f"<script>{_asset(name)}</script>" for name in scripts),
    )


def content_policy(scripts: Sequence[str] = SCRIPTS) -> str:
    """Return the content security policy of a page: its own scripts and style, and no request.

    A page that a server updates may request its data from that server.
    """
    hashes = " ".join(_hash(_asset(name)) for name in scripts)
    connect = "" if scripts == SCRIPTS else "connect-src 'self'; "
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(_style())}; {connect}"
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    return _asset("uPlot.min.css") + _asset("page.css")


@cache
def _asset(name: str) -> str:
    return resources("robo_orchard_lab.report").joinpath("assets", name).read_text("utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"


def write(path: Path, page: str | bytes) -> None:
    """Replace a file by a page or other data, atomically.

    Raises:
        OSError: the file can't be written; an old file is unchanged.
    """
    # As replace_file of the pipeline, which imports torch; remove_leftovers knows the name.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(page.encode() if isinstance(page, str) else page)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
