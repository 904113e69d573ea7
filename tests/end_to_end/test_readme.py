"""What the documents show works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", PYTHON_BLOCKS, ids=lambda script: f"{len(script)} characters")
def test_each_python_block_runs(script: str, tmp_path: Path) -> None:
    """Every Python block of the README is a script that runs without an error or a warning."""
    finished = _run(script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr


def test_the_first_hook_tells_the_mean_loss(tmp_path: Path) -> None:
    """The README's hook stands in the tree, tells each epoch's mean loss, and the model learns."""
    output = _run(PYTHON_BLOCKS[0], tmp_path).stdout
    assert re.search(r"after=<FunctionInfo bound method MeanLossHook\(id=\d+\)\.tell from", output)
    means = [float(mean) for mean in re.findall(r"^epoch \d: mean loss (\d\.\d{3})$", output, re.M)]
    assert len(means) == 10
    assert means[-1] < 0.1 * means[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_into_the_repository_lead_somewhere(document: str) -> None:
    """Every link to a file of the repository names one that is there."""
    text = (ROOT / document).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_hooks_that_come_with_it_are_in_the_table() -> None:
    """The README's table of hooks has every hook that the package exports."""
    from robo_orchard_lab.pipeline import PipelineHooks, hooks

    exported = {
        name
        for name in hooks.__all__
        if isinstance(cls := getattr(hooks, name), type) and issubclass(cls, PipelineHooks)
    }
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert set(table) == exported
