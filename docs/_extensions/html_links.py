"""Check of the inner links of the built pages: a link without file or anchor is a warning."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.add(value)


def broken_links(folder: Path) -> list[str]:
    """Return ``page: link`` for each link into the site without a file or an anchor."""
    pages = {file: _Page(file.read_text("utf-8")) for file in sorted(folder.rglob("*.html"))}
    broken = []
    for file, page in pages.items():
        for link in sorted(page.links):
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme or link.startswith("//") or link == "#":
                continue
            path = unquote(urlsplit(address).path)
            target = (file.parent / path).resolve() if path else file
            is_there = target.is_file() and (
                not anchor or target not in pages or unquote(anchor) in pages[target].anchors
            )
            if not is_there:
                broken.append(f"{file.relative_to(folder)}: {link}")
    return broken


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for link in broken_links(Path(app.outdir).resolve()):
            logger.warning("broken link in %s", link)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
