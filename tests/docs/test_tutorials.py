"""The tutorials run as downloaded: as scripts and as notebooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from sphinx_gallery.notebook import python_to_jupyter_cli  # type: ignore[import-untyped]

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
QUICK = ("3_custom_hooks", "4_metrics_and_evaluation")
"""Tutorials of the default suite: a few seconds each, without further processes."""
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(path.stem for path in TUTORIALS.glob("[0-9]_*.py"))
]
LONGEST_S = 600


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a fresh folder the working directory; temporary files are below it, too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # without ipywidgets
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs_as_a_script(name: str, folder: Path) -> None:
    """A tutorial runs alone in an empty folder, and prints no warning and no path of a machine."""
    script = shutil.copy(TUTORIALS / f"{name}.py", folder)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    _check_text(done.stdout, folder)
    assert {path.name for path in folder.iterdir()} == {f"{name}.py", "temporary"}


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs_as_a_notebook(name: str, folder: Path) -> None:
    """The notebook of a tutorial runs from its first to its last cell, each with an output."""
    script = shutil.copy(TUTORIALS / f"{name}.py", folder)
    python_to_jupyter_cli([str(script)])
    text = (folder / f"{name}.ipynb").read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    client = nbclient.NotebookClient(notebook, timeout=LONGEST_S, kernel_name="python3")
    client.execute()
    for text in _outputs(notebook):
        _check_text(text, folder)


def _outputs(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Yield the texts of the outputs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "") + output.get("data", {}).get("text/html", "")


def _check_text(text: str, folder: Path) -> None:
    """Check that a reader sees no warning, no terminal codes and no folder of this machine."""
    assert "Warning" not in text
    assert "\x1b" not in text
    assert str(folder) not in text
    assert sys.prefix not in text
