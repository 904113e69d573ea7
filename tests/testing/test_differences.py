"""Tests of the comparison of nested states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from robo_orchard_lab.testing.assertions import differences

NAN = math.nan


@pytest.mark.parametrize(
    "state",
    [
        {"a": [1, (2.0, None)], "b": {"c": torch.ones(2)}},
        [NAN, torch.tensor([1.0, NAN])],
        {"empty": {}, "none": [], "flag": torch.tensor(True)},
    ],
)
def test_equal_states_have_no_difference(state: Any) -> None:
    """NaN equals NaN."""
    assert [*differences(state, state)] == []


@pytest.mark.parametrize(
    ("found", "expected", "reported"),
    [
        ({"a": 1}, {"a": 2}, [("a", "is 1, expected 2")]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, [("a.b[1]", "is 2, expected 3")]),
        ({}, {"a": 1}, [("a", "is missing")]),
        ({"a": 1}, {}, [("a", "is 1, expected none")]),
        ([1, 2], [1], [("", "has 2 items, expected 1")]),
        ((1,), [1], [("", "is (1,), expected [1]")]),
        (NAN, 1.0, [("", "is nan, expected 1.0")]),
        (
            {"a": 1, "b": 2},
            {"a": 0, "b": 0},
            [("a", "is 1, expected 0"), ("b", "is 2, expected 0")],
        ),
        (
            torch.tensor([[1.0, NAN], [2.0, 3.0]]),
            torch.tensor([[1.0, NAN], [5.0, 6.0]]),
            [("", "is 2.0, expected 5.0, at [1, 0] (2 of 4 elements differ)")],
        ),
        (
            torch.ones(2),
            torch.ones(2, dtype=torch.float64),
            [("", "is a tensor of torch.float32 (2,), expected torch.float64 (2,)")],
        ),
        ({"a": torch.ones(())}, {"a": 1.0}, [("a", "is tensor(1.), expected 1.0")]),
    ],
)
def test_a_difference_has_a_path(found: Any, expected: Any, reported: list[Any]) -> None:
    """The text has the found and the expected value."""
    assert [*differences(found, expected)] == reported
