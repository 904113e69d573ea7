"""Links from pages to files outside of ``docs/``, as GitHub follows them.

Documents of the repository, such as SECURITY.md, become pages of ``project/``; other linked files,
such as tests, become pages of ``repository/`` with their highlighted text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri

SOURCES = Path(__file__).resolve().parents[1]  # a copy of docs/ in docs/_build
ROOT = SOURCES.parents[2]
PAGES = {
    "README.md": "project/readme",
    "ARCHITECTURE.md": "project/architecture",
    "CONTRIBUTING.md": "project/contributing",
    "SECURITY.md": "project/security",
    "CHANGELOG.md": "project/changelog",
    "benchmarks/README.md": "project/benchmarks",
    "benchmarks/RESULTS.md": "project/benchmark_results",
}
_SCHEME = "repository:"
_CODE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_LARGEST = 400_000  # characters of a file that is shown


def _write_project_pages(app: Sphinx) -> None:
    """Write the documents of the repository as sources of pages."""
    for name, page in PAGES.items():
        target = SOURCES / f"{page}.md"
        target.parent.mkdir(exist_ok=True)
        text = _relocated((ROOT / name).read_text("utf-8"), (ROOT / name).parent, page)
        if not target.exists() or target.read_text("utf-8") != text:  # else it is not built again
            target.write_text(text, "utf-8")


def _relocate(app: Sphinx, docname: str, source: list[str]) -> None:
    if _is_page(docname):
        source[0] = _relocated(source[0], (ROOT / "docs" / docname).parent, docname)


def _is_page(docname: str) -> bool:
    """Return True for a page of docs/ in Markdown."""
    return (ROOT / "docs" / f"{docname}.md").exists()


def _relocated(text: str, folder: Path, page: str) -> str:
    """Return Markdown of a file in ``folder`` for a page of the site, with links of the site."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        target = Path(os.path.normpath(folder / path))
        if ":" in path or not target.exists():
            return found[0]  # an address, or reported by Sphinx
        name = os.path.relpath(target, ROOT)
        if name in PAGES:
            name = f"docs/{PAGES[name]}.md"
        elif name.startswith("docs/tutorials"):
            name = f"docs/gallery/{target.stem if target.suffix == '.py' else 'index'}.rst"
        elif not name.startswith("docs/"):
            return f"{_SCHEME}{name}"
        return os.path.relpath(name.removeprefix("docs/"), os.path.dirname(page)) + anchor

    parts = _CODE.split(text)
    return "".join(part if n % 2 else _LINK.sub(link, part) for n, part in enumerate(parts))


def _page_of(name: str) -> str:
    return f"repository/{name}"


def _resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace links to files by links to their pages, and remember the files."""
    for node in doctree.findall(nodes.reference):
        address = node.get("refuri", "")
        if address.startswith(_SCHEME):
            name = address.removeprefix(_SCHEME)
            here = app.builder.get_target_uri(docname)
            node["refuri"] = relative_uri(here, quote(f"{_page_of(name)}.html"))
            node["internal"] = True


def _linked_files() -> Iterator[str]:
    """Return the files of the repository that a page links to, and the files of linked folders."""
    found: dict[str, None] = {}
    for source in sorted(SOURCES.rglob("*.md")):
        text, page = source.read_text("utf-8"), os.path.relpath(source, SOURCES)[:-3]
        if _is_page(page):
            text = _relocated(text, (ROOT / "docs" / page).parent, page)
        for part in _CODE.split(text)[::2]:
            found |= dict.fromkeys(re.findall(rf"\]\({_SCHEME}([^)\s#]+)", part))
    for name in list(found):
        yield name
        if (ROOT / name).is_dir():
            for path in sorted((ROOT / name).iterdir()):
                inner = os.path.relpath(path, ROOT)
                if inner not in found and path.is_file() and not path.name.startswith("."):
                    found[inner] = None
                    yield inner


def _collect_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Return a page for each linked file."""
    highlight: Callable[..., str] = app.builder.highlighter.highlight_block  # type: ignore[attr-defined]
    names = list(_linked_files())
    for name in names:
        path, page = ROOT / name, _page_of(name)
        if path.is_dir():
            inner = [n for n in names if os.path.dirname(n) == name]
            items = "".join(
                f'<li><a href="{relative_uri(f"{page}.html", quote(f"{_page_of(n)}.html"))}">'
                f"<code>{os.path.basename(n)}</code></a></li>"
                for n in inner
            )
            body = f"<ul>{items}</ul>"
        else:
            body = highlight(*_text_of(path), linenos=False)
        yield page, {"title": name, "body": f"<h1><code>{name}</code></h1>{body}"}, "page.html"


def _text_of(path: Path) -> tuple[str, str]:
    """Return the text of a file and the name of its lexer."""
    text = path.read_text("utf-8", errors="replace")[:_LARGEST]
    try:
        return text, get_lexer_for_filename(path.name).aliases[0]
    except ClassNotFound:
        return text, "text"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _write_project_pages)
    app.connect("source-read", _relocate)
    app.connect("doctree-resolved", _resolve)
    app.connect("html-collect-pages", _collect_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
