"""The reference tutorial runs as printed, at a small size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
PRINT_SCRIPT = SHARED / "tools" / "tutorial_script.py"
PAGE = SHARED / "seeds" / "custom_hook_tutorial.rst.txt"

pytestmark = pytest.mark.skipif(
    not (PRINT_SCRIPT.exists() and PAGE.exists()),
    reason=f"the tutorial is not part of the repository and does not lie in {SHARED}",
)

BEGINNING = "Begining"  # codespell:ignore begining - the tutorial spells it so
STEPS_PER_EPOCH, EPOCHS, LOGGED_EVERY = 48 // 4, 2, 5  # of `tutorial_script.py --small`


class Run(NamedTuple):
    """Results of the script."""

    folder: Path
    output: str
    log: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the script in an empty folder in its own process."""
    folder = tmp_path_factory.mktemp("tutorial")
    script = subprocess.run(
        [sys.executable, PRINT_SCRIPT, "--small"], capture_output=True, text=True, check=True
    ).stdout
    (folder / "tutorial.py").write_text(script, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "tutorial.py"], cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr
    return Run(folder, finished.stdout, finished.stderr)


def test_hooks_of_loop_epoch_and_step_are_called_in_order(run: Run) -> None:
    """The log has each begin and end once, nested, from the loop to every fifth step."""
    expected = [f"{BEGINNING} loop"]
    for epoch in range(EPOCHS):
        expected.append(f"{BEGINNING} {epoch}-th epoch")
        for step in range(LOGGED_EVERY - 1, STEPS_PER_EPOCH, LOGGED_EVERY):
            expected += [f"{BEGINNING} {step}-th step", f"Ended {step}-th step"]
        expected.append(f"Ended {epoch}-th epoch")
    expected.append("Ended loop")
    assert re.findall(rf"(?:{BEGINNING}|Ended) (?:loop|\d+-th \w+)", run.log) == expected


def test_nothing_is_warned_about(run: Run) -> None:
    """The log has no warnings, neither Python's nor a logger's."""
    assert "warning" not in run.log.lower()


def test_the_hooks_are_printed_as_on_the_page(run: Run) -> None:
    """The printed tree equals the page's, except for ids and files."""
    printed = _page_output()
    assert printed.count("\n") > 20  # the page was parsed
    assert _without_locations(run.output).rstrip("\n") == _without_locations(printed)


def test_the_optimizer_hook_is_the_outermost_on_step(run: Run) -> None:
    """The first hook of on_step updates the weights."""
    on_step = run.output[run.output.index("on_step: ") :]
    first = on_step[on_step.index("0: <") : on_step.index("1: <")]
    assert "OptimizerHook" in first


def test_each_function_is_where_the_tree_says(run: Run) -> None:
    """Every file and line in the tree leads to the function's definition."""
    functions = re.findall(r"\.(\w+) from (.+):(\d+)>", run.output)
    assert len(functions) == 7  # three pairs of the script's and the optimizer's
    for name, file, line in functions:
        lines = (run.folder / file).read_text(encoding="utf-8").splitlines()
        assert f"def {name}(" in lines[int(line) - 1], f"{file}:{line}"


def _page_output() -> str:
    """Return the script's output as shown on the page, without indentation."""
    page = PAGE.read_text(encoding="utf-8")
    block = page[page.index("sphx-glr-script-out") :]
    indent = " " * 4
    lines = block[block.index(f"\n{indent}<") + 1 :].splitlines()
    body = lines[: next(i for i, line in enumerate(lines) if not line.startswith(indent))]
    return "\n".join(line.removeprefix(indent) for line in body)


def _without_locations(tree: str) -> str:
    """Return the tree without ids, files and line numbers."""
    return re.sub(r" from .+:\d+>", " from FILE:LINE>", re.sub(r"id=\d+", "id=ID", tree))
