"""HTML page of a run, or of several runs for comparison: one self-contained file."""

from __future__ import annotations

import html
import json
import os
import uuid
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
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
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def render(folders: Sequence[Path], *, sort: str | None = None) -> str:
    """Return the page of one run, or the comparison of several.

    Text of the runs is in the page's data alone, and the page's script shows it as text. A content
    security policy admits the page's own script and style, and no request.

    Args:
        folders: run folders.
        sort: metric that sorts a comparison.
    """
    runs = [read_story(folder, MAX_POINTS // len(folders)) for folder in folders]
    data: dict[str, Any] = {
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
    }
    title = runs[0]["name"]
    if len(runs) > 1:
        paths = [os.path.abspath(folder) for folder in folders]
        for run, path in zip(runs, paths, strict=True):
            run["name"] = text(os.path.relpath(path, os.path.commonpath(paths)), limit=200)
        data["differences"] = [{"path": path, "values": v} for path, v in differing(runs)]
        data["sort"] = sort
        title = f"Comparison: {' · '.join(run['name'] for run in runs)}"
    library, script = _asset("uPlot.iife.min.js"), _asset("page.js")
    style = _asset("uPlot.min.css") + _asset("page.css")
    scripts = " ".join(map(_hash, (library, script)))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(style)}; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    document = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    document = document.encode("utf-8", "replace").decode()  # lone surrogates, as in names
    for character in "<>&\u2028\u2029":
        document = document.replace(character, f"\\u{ord(character):04x}")
    return _PAGE.format(
        policy=policy,
        title=html.escape(title[:200]),
        style=style,
        data=document,
        library=library,
        script=script,
    )


def _asset(name: str) -> str:
    return resources("robo_orchard_lab.report").joinpath("assets", name).read_text("utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"


def write(path: Path, page: str) -> None:
    """Replace a file by a page, atomically.

    Raises:
        OSError: the page can't be written; an old file is unchanged.
    """
    # As replace_file of the pipeline, which imports torch; remove_leftovers knows the name.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(page)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
