"""Code blocks, links and tables of the documents are correct."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launching import launch
from pages import UNCHECKED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "_build" not in page.parts]
DOCUMENTS = [*ROOT.glob("*.md"), *PAGES]


def _python_blocks(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.S)


TRAINERS = ("accelerate", "lightning", "mmengine", "transformers")
RUN_ELSEWHERE = ["experiments", "robot_data", *(f"migrate_{name}" for name in TRAINERS)]
BLOCKS = [
    pytest.param(script, id=f"{document.stem}-{number}")
    for document in PAGES
    if document.stem in UNCHECKED.difference(RUN_ELSEWHERE)
    for number, script in enumerate(_python_blocks(document))
]


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script, encoding="utf-8")
    return launch(folder / "script.py", processes=1, folder=folder)


@pytest.mark.parametrize("script", BLOCKS)
def test_each_python_block_runs(script: str, tmp_path: Path) -> None:
    """Every Python block of a page runs without an error or a warning."""
    finished = _run(script, tmp_path)
    assert "Warning" not in finished.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_into_the_repository_exist(document: Path) -> None:
    """Every link into the repository, outside of code, names an existing file and heading."""
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", _without_code(document))
    for name, anchor in [link for link in links if "://" not in link[0]]:
        target = document.parent / name if name else document
        assert target.exists(), name
        assert not anchor or anchor in _anchors(target), f"{name}#{anchor}"


def _without_code(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.M | re.S)


def _anchors(document: Path) -> list[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", _without_code(document), re.M)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_the_table_of_hooks_is_complete() -> None:
    """The table in docs/how_to/hooks.md has every hook that the packages export."""
    from robo_orchard_lab import policy, search
    from robo_orchard_lab.pipeline import PipelineHooks, hooks

    exported = {
        name
        for package in (hooks, policy, search)
        for name in package.__all__
        if isinstance(cls := getattr(package, name), type) and issubclass(cls, PipelineHooks)
    }
    section = (ROOT / "docs/how_to/hooks.md").read_text("utf-8").split("## Built-in hooks")[1]
    table = re.findall(r"^\| `(\w+)` \|", section.split("\n## ")[0], re.M)
    assert set(table) == exported


def test_the_tests_named_in_the_security_page_exist() -> None:
    """Every test that SECURITY.md names exists."""
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)?::(test_\w+)`", text)
    assert len(named) > 20
    file = ""
    for in_file, test in named:
        file = in_file or file  # or the file of the previous test
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"


def test_the_documented_limits_equal_the_code() -> None:
    """SECURITY.md states the limits of files and checkpoints in the code."""
    from robo_orchard_core.utils.config import formats
    from robo_orchard_lab.experiment import document as reading
    from robo_orchard_lab.experiment import prevalidation as screening
    from robo_orchard_lab.pipeline.checkpoint import ReadLimits

    text = " ".join((ROOT / "SECURITY.md").read_text("utf-8").split())
    assert (
        f"{reading.MAX_FILE_BYTES >> 10} KiB for a file with its bases, "
        f"{reading.MAX_BASES} bases, {reading.MAX_VALUES:,} values, {formats.MAX_DEPTH} levels, "
        f"{reading.MAX_KEY} characters for a key and {screening.MAX_REFERENCE} for a code reference"
    ) in text
    assert f"{formats.MAX_BYTES >> 20} MiB and {formats.MAX_DEPTH} levels for other" in text
    limits = ReadLimits()
    assert (
        f"{limits.max_files:,} files, {limits.max_manifest_bytes >> 20} MiB for the manifest, "
        f"{limits.max_json_bytes >> 20} MiB and {limits.max_json_depth} levels for the JSON"
    ) in text
