"""A newcomer's path: what to read from the README to a hook in a package of one's own."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 150
PATH = {  # page: the last section to read
    "README.md": "Quick start",
    "docs/how_to/own_package.md": "",
}
STEPS = {  # what the path has to show, in this order
    "install": "pip install",
    "first run": "$ robo-orchard-lab train",
    "resume": "Press Ctrl-C",
    "own hook in an own package": "# my_team/hooks.py",
    "run with the hook": "$ robo-orchard-lab train team.yaml",
    "proof": "$ robo-orchard-lab prove-resume team.yaml",
    "report": "$ robo-orchard-lab report runs/team",
}


def read(page: str, last_section: str) -> str:
    """Return the text from the top of a page to the end of a section."""
    text = (ROOT / page).read_text("utf-8")
    if last_section:
        before, section = text.split(f"\n## {last_section}\n")
        text = before + section.split("\n## ")[0]
    return text


def test_a_newcomer_reads_less_than_150_lines() -> None:
    """Links alone lead from the README to a resumed run with an own hook, and to its report.

    The blocks of these pages run in test_pages.py.
    """
    texts = [read(page, section) for page, section in PATH.items()]
    for text, following in zip(texts, [*PATH][1:], strict=False):
        assert following in re.findall(r"\]\(([^)#]+)", text)
    everything = "\n".join(texts)
    places = [everything.find(found) for found in STEPS.values()]
    assert -1 not in places, dict(zip(STEPS, places, strict=True))
    assert places == sorted(places)
    assert len(everything.splitlines()) < MAX_LINES
