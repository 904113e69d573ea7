"""Pages about other trainers: their script and ours train equal weights."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from launching import launch

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how_to"
OTHERS_OF_LIGHTNING = [(0, 2), (3, 4), (5, 6), (7, 8), (9, 10)]  # pairs after the first
PACKAGES = {
    "Lightning": "pytorch_lightning",
    "Transformers' Trainer": "transformers",
    "Accelerate": "accelerate",
    "MMEngine": "mmengine",
}


def _blocks(name: str) -> list[str]:
    page = HOW_TO / f"migrate_{name.partition(chr(39))[0].lower()}.md"
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)


BLOCKS = {name: _blocks(name) for name in PACKAGES}
COMMON = BLOCKS["Lightning"][0]
SCRIPTS = {name: blocks[1:] for name, blocks in BLOCKS.items()}
RELAXED = "import warnings\n\nwarnings.simplefilter('ignore')\n"  # of their libraries
Weights = dict[str, torch.Tensor]
WeightsOf = Callable[[str, int], Weights]


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> WeightsOf:
    """Return a function that runs a script of the page once, and returns its network's weights."""

    @functools.cache
    def run(name: str, number: int) -> Weights:
        script = SCRIPTS[name][number]
        is_ours = "HookBasedTrainer" in script
        if name == "Lightning" and (number == 2 or (number and not is_ours)):
            script = SCRIPTS[name][0].partition("\nmodel = ")[0] + "\n" + script  # its module
        folder = tmp_path_factory.mktemp("script")
        return (_run_ours if is_ours else _run_theirs)(COMMON + script, folder)

    return run


def _run_ours(script: str, folder: Path) -> Weights:
    """Run a script in this process, where warnings are errors."""
    found = dict[str, Any]()
    try:
        with contextlib.chdir(folder):
            exec(script, found)  # noqa: S102  # a script of the page
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    weights: Weights = found["net"].state_dict()
    return weights


def _run_theirs(script: str, folder: Path) -> Weights:
    script = f"{RELAXED}{script}\ntorch.save(net.state_dict(), 'trained.pt')\n"
    (folder / "script.py").write_text(script, encoding="utf-8")
    launch(folder / "script.py", processes=1, folder=folder)
    found: Weights = torch.load(folder / "trained.pt", weights_only=True)
    return found


def test_each_package_has_a_pair_of_scripts() -> None:
    """Each page has pairs of scripts after the lines in common; Lightning's one of the adapter."""
    assert {blocks[0] for blocks in BLOCKS.values()} == {COMMON}
    are_ours = {
        name: ["HookBasedTrainer" in script for script in scripts]
        for name, scripts in SCRIPTS.items()
    }
    of_lightning = [False, True, True, *[False, True] * 4]
    assert are_ours == {name: [False, True] for name in PACKAGES} | {"Lightning": of_lightning}


@pytest.mark.parametrize("name", PACKAGES)
def test_our_script_trains(name: str, weights_of: WeightsOf) -> None:
    """Our script runs without a warning, and changes the weights."""
    trained, untrained = weights_of(name, 1), dict[str, Any]()
    exec(COMMON, untrained)  # noqa: S102  # lines of the page
    assert not torch.equal(trained["0.weight"], untrained["make_net"]()[0].weight)


PAIRS = [*((name, 0, 1) for name in PACKAGES), *(("Lightning", *p) for p in OTHERS_OF_LIGHTNING)]


@pytest.mark.parametrize(("name", "their_number", "our_number"), PAIRS)
def test_both_scripts_train_equal_weights(
    name: str, their_number: int, our_number: int, weights_of: WeightsOf
) -> None:
    """The script of the other package and ours end with the same weights, bit for bit."""
    package = PACKAGES[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -r requirements/peers.txt")
    theirs, ours = weights_of(name, their_number), weights_of(name, our_number)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
