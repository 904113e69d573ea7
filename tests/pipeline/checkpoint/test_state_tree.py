"""State trees as JSON and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.checkpoint.state_tree import decode_state, encode_state
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
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3).T,
        np.arange(4, dtype=np.uint16)[::-1],
        np.array(2.5),
        np.zeros((0, 3), dtype=bool),
        np.broadcast_to(np.int64(3), (2,)),
        np.array([1 + 2j], dtype=np.complex64),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_numpy_arrays_keep_type_shape_and_values(array: Any, tmp_path: Path) -> None:
    """An array is the same array after a save and a load."""
    state = {"seen": [array], "mean": torch.zeros(1)}
    save_checkpoint(tmp_path / "saved", 1, {"hook": state})
    loaded = load_checkpoint(tmp_path / "saved").parts["hook"]
    (found,) = loaded["seen"]
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    found[...] = 0  # may be changed


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, object()]}, r"a\.1 can't be saved: .* found object"),
        ({1, 2}, "the state can't be saved: .* found set"),
        ({(1, object()): 2}, r"can't be saved: .* found object"),
        ({"names": np.array(["a"])}, "names can't be saved: .* NumPy array of numbers"),
        ({"any": np.array([{}])}, "any can't be saved: .* found ndarray"),
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
        {"$numpy": "nowhere"},
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
