"""Merging documents."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.experiment.overrides import merge

KEYS = st.sampled_from(["a", "b", "hooks", "data", "evaluation", "optimizer", "groups"])
LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["x", "y"])


def merged(beneath: dict[str, Plain], above: dict[str, Plain]) -> dict[str, Plain]:
    """Merge documents without origins."""
    return merge((beneath, {}), (above, {}))[0]


def without_nulls(value: Plain) -> Plain:
    """Return the value with None, which may mean removal, replaced by 0."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items()}
    return 0 if value is None else value


def documents(keys: st.SearchStrategy[str] = KEYS) -> st.SearchStrategy[dict[str, Plain]]:
    """Return small documents with frequent common keys."""
    values = st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(keys, values.map(without_nulls), max_size=3)


@given(documents())
def test_a_document_over_itself_or_nothing_is_itself(document: dict[str, Plain]) -> None:
    """Merging a document with itself or an empty document changes nothing."""
    assert merged(document, document) == document
    assert merged({}, document) == document
    assert merged(document, {}) == document


@given(documents(), documents(), documents())
def test_merging_is_associative(
    first: dict[str, Plain], second: dict[str, Plain], third: dict[str, Plain]
) -> None:
    """Merging is associative unless a value becomes a mapping."""
    if shape_changes(first, second) or shape_changes(second, third):
        return  # a mapping over a list drops the list, whatever lay beneath
    one, other = merged(merged(first, second), third), merged(first, merged(second, third))
    assert one == other


def shape_changes(beneath: Plain, above: Plain) -> bool:
    """Return True if a mapping replaces another type, or the reverse."""
    if isinstance(beneath, dict) and isinstance(above, dict):
        return any(shape_changes(beneath[key], above[key]) for key in above if key in beneath)
    return isinstance(beneath, dict) != isinstance(above, dict)


@given(documents(), documents())
def test_upper_document_takes_precedence_and_inputs_stay_unchanged(
    beneath: dict[str, Plain], above: dict[str, Plain]
) -> None:
    """Each value of the upper document is in the result, and both inputs are unchanged."""
    copies = repr((beneath, above))
    result = merged(beneath, above)
    assert repr((beneath, above)) == copies
    assert merged(result, above) == result


def test_mappings_merge_in_the_order_of_the_lower_one() -> None:
    """The order of hooks is kept, and a changed hook keeps its position."""
    beneath: dict[str, Plain] = {"hooks": {"a": {"x": 1}, "b": {"x": 1}}}
    above: dict[str, Plain] = {"hooks": {"c": {}, "b": {"y": [1]}, "a": {"x": 2}}}
    result = merged(beneath, above)
    assert result == {"hooks": {"a": {"x": 2}, "b": {"x": 1, "y": [1]}, "c": {}}}
    assert isinstance(result["hooks"], dict)
    assert [*result["hooks"]] == ["a", "b", "c"]


@pytest.mark.parametrize("key", PART_KEYS)
def test_another_class_replaces_the_mapping(key: str) -> None:
    """The arguments of one class are not passed to another."""
    beneath: dict[str, Plain] = {"model": {"class_type": "m:A", "x": 1}}
    assert merged(beneath, {"model": {"class_type": "m:A", "y": 2}}) == {
        "model": {"class_type": "m:A", "x": 1, "y": 2}
    }
    assert merged(beneath, {"model": {key: "m:B"}}) == {"model": {key: "m:B"}}


def test_class_merges_over_arguments_without_a_class() -> None:
    """A base may set an argument and leave the class to its variants."""
    assert merged({"optimizer": {"lr": 1}}, {"optimizer": {"class_type": "m:A"}}) == {
        "optimizer": {"lr": 1, "class_type": "m:A"}
    }


@pytest.mark.parametrize("path", [("hooks",), ("data", "evaluation"), ("optimizer", "groups")])
def test_null_removes_a_named_entry(path: tuple[str, ...]) -> None:
    """Null removes a hook, an evaluation set or a parameter group."""

    def at_path(value: Plain) -> dict[str, Plain]:
        for key in reversed(path):
            value = {key: value}
        assert isinstance(value, dict)
        return value

    beneath = at_path({"stats": {"x": 1}, "bar": {"x": None}})
    assert merged(beneath, at_path({"stats": None})) == at_path({"bar": {"x": None}})
    place = ".".join((*path, "stat"))
    with pytest.raises(ConfigFieldError, match=re.escape(f"{place}: null removes an entry")) as e:
        merged(beneath, at_path({"stat": None}))
    assert "did you mean 'stats'?" in str(e.value)


def test_null_is_a_value_elsewhere() -> None:
    """Other fields are set to None."""
    assert merged({"checkpoint": {"x": 1}, "a": {"hooks": {"b": 1}}}, {"checkpoint": None}) == {
        "checkpoint": None,
        "a": {"hooks": {"b": 1}},
    }
    assert merged({"a": {"hooks": {"b": 1}}}, {"a": {"hooks": {"b": None}}}) == {
        "a": {"hooks": {"b": None}}
    }
