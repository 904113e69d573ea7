"""State trees as JSON and tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from robo_orchard_lab.pipeline.checkpoint.state import decode_state, encode_state
from robo_orchard_lab.pipeline.errors import StateError
from state_trees import same, states


@given(states)
def test_any_state_round_trips(state: Any) -> None:
    """Values, types and the order of keys survive strict JSON."""
    document, found = encode_state(state)
    text = json.dumps(document, allow_nan=False)
    assert same(decode_state(json.loads(text), found), state)


def test_tensors_with_equal_paths_stay_separate() -> None:
    """Keys with dots, or the keys 1 and "1", do not merge two tensors."""
    state = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "c": {1: torch.ones(2), "1": torch.zeros(2)},
    }
    assert same(decode_state(*encode_state(state)), state)


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(3), np.float32(0.5), np.bool_(True)])
def test_numpy_scalars_become_python_numbers(value: Any) -> None:
    """A best value that NumPy computed is saved as the same number."""
    found = decode_state(*encode_state({"best": value}))["best"]
    assert found == value
    assert type(found) in (float, int, bool)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, object()]}, r"a\.1 can't be saved: .* found object"),
        ({1, 2}, "the state can't be saved: .* found set"),
        ({(1, object()): 2}, r"can't be saved: .* found object"),
    ],
)
def test_unsupported_value_is_refused_with_its_path(state: Any, message: str) -> None:
    """A value without an exact form is named by its path in the state."""
    with pytest.raises(StateError, match=message):
        encode_state(state)


@pytest.mark.parametrize(
    "document",
    [
        {"$float": "1"},
        {"$tensor": "nowhere"},
        {"$other": []},
        {"$dict": [[1]]},
        {"$dict": 3},
        {"$float": "inf", "b": 1},
        {"$tuple": None},
        {"$dict": [[[], 1]]},
    ],
)
def test_invalid_documents_are_refused(document: Any) -> None:
    """An unknown or malformed mark is an error, not a guess."""
    with pytest.raises(StateError, match="unknown value"):
        decode_state(document, {})
