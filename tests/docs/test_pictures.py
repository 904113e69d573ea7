"""Pictures of the explanation pages equal what they are drawn from."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="requires the extra docs")

from benchmarks import charts

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/explanation"


def drawn(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts of an SVG file, and the left edge of each bar."""
    svg = path.read_text("utf-8")
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    return texts, re.findall(r'<path d="M (\S+) ', svg)


def test_timeline_shows_the_events_of_a_run(tmp_path: Path) -> None:
    """The timeline in the repository equals a drawing of a new run."""
    runpy.run_path(str(PAGES / "draw_timeline.py"))["main"](tmp_path / "timeline.svg")
    assert drawn(PAGES / "timeline.svg") == drawn(tmp_path / "timeline.svg")


@pytest.mark.parametrize("chart", charts.CHARTS)
def test_chart_shows_the_latest_figures(chart: str, tmp_path: Path) -> None:
    """A chart in the repository equals a drawing of results.json."""
    charts.draw(charts.table_of(chart), tmp_path / f"{chart}.svg")
    redrawn = drawn(tmp_path / f"{chart}.svg")[0]
    assert drawn(charts.FOLDER / f"{chart}.svg")[0] == redrawn, "run: python -m benchmarks.charts"
