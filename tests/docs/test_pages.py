"""Every page of the documentation runs as printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from pages import UNCHECKED, Page

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"search"}
PAGES = [
    pytest.param(
        path, id=f"{path.relative_to(ROOT)}", marks=[pytest.mark.slow] if path.stem in SLOW else []
    )
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*/*.md"))]
    if path.stem not in UNCHECKED
]


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("path", PAGES)
def test_the_page_runs_and_prints_what_it_shows(path: Path, tmp_path: Path) -> None:
    """All blocks of a page run in an empty folder, in order, and their output is on the page.

    ``REWRITE_PAGES=1`` writes the output into the page instead.
    """
    page = Page(path, tmp_path / "page")
    page.run()
    if os.environ.get("REWRITE_PAGES"):
        page.rewrite()
    else:
        page.check()
