"""Models in DDP: gradients are reduced however a processor uses the model, and ranks agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "methods_on_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("methods")
    launch(SCRIPT, folder, "call", "method", "module", "unwrapped", "items", "unused")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def trained(found: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of the layers, by their names in each kind of model."""
    return {name: value for name, value in found["weights"].items() if "unused" not in name}


@pytest.mark.parametrize("kind", ["method", "module", "unwrapped", "items", "unused"])
def test_any_use_of_the_model_trains_like_a_call(kind: str, ranks: list[dict[str, Any]]) -> None:
    """A method, ``model.module``, an unwrapped model and a submodule give a call's weights."""
    first, second = ranks
    assert first[kind]["weights"] == second[kind]["weights"]
    assert trained(first[kind]) == trained(first["call"])


def test_evaluation_accepts_the_same_processors(ranks: list[dict[str, Any]]) -> None:
    """Each kind of processor evaluates to the same values, on both ranks."""
    values = [found["values"] for rank in ranks for found in rank.values()]
    assert values[0]
    assert values == [values[0]] * 12


def test_forward_hooks_run_once_per_call(ranks: list[dict[str, Any]]) -> None:
    """A forward hook on the DDP model sees the inputs and outputs of calls in training only."""
    for rank in ranks:
        assert rank["call"]["seen"] == [[1, [2, 2]]] * 6
        assert [rank[kind]["seen"] for kind in rank if kind != "call"] == [[]] * 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("outside", "the gradient of 'group0.param8' differs between ranks at step 1"),
        ("saved", "the weights of 'layers.2.bias' differ between ranks at step 6"),
        ("ended", "the weights of 'layers.2.bias' differ between ranks at step 12"),
        ("epoch", "the weights of 'layers.2.bias' differ between ranks at step 20"),
        ("closed", "the weights of 'layers.2.bias' differ between ranks at step 40"),
        ("processor", "the weights of 'batch_processor.critic.layers.0.weight' differ between"),
    ],
)
def test_ranks_that_differ_end_the_run(kind: str, message: str, tmp_path: Path) -> None:
    """The error names the first different parameter, and no checkpoint is written.

    Ranks that drift by the last hook, or in a model of the batch processor, are found as well.
    """
    failed = launch(SCRIPT, tmp_path, "drift", kind, fails=True)
    assert message in failed.stderr
    assert not [*tmp_path.glob("checkpoints/*/manifest.json")]
