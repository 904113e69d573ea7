"""Nested states as JSON and tensors."""

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
def test_every_state_survives(state: Any) -> None:
    """Through strict JSON and back, values, types and order of keys are the same."""
    document, found = encode_state(state)
    text = json.dumps(document, allow_nan=False)
    assert same(decode_state(json.loads(text), found), state)


def test_tensors_at_places_of_one_name_stay_apart() -> None:
    """Keys with dots in them, or 1 beside "1", do not make one tensor of two."""
    state = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "c": {1: torch.ones(2), "1": torch.zeros(2)},
    }
    assert same(decode_state(*encode_state(state)), state)


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(3), np.float32(0.5), np.bool_(True)])
def test_numbers_of_numpy_become_pythons(value: Any) -> None:
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
def test_other_values_are_refused_with_their_place(state: Any, message: str) -> None:
    """What has no exact form is named by its place in the state."""
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
def test_unknown_documents_are_refused(document: Any) -> None:
    """A mark that is not known or has no sense is an error, not a guess."""
    with pytest.raises(StateError, match="unknown value"):
        decode_state(document, {})
