"""Paths as people write them, and as errors show them."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_core.utils.config.errors import dotted, parse_path


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5)
)
def test_paths_are_read_as_they_are_written(path: list[str]) -> None:
    """Whatever is in the keys, the dotted path that errors show leads back to them."""
    assert parse_path(dotted(path)) == tuple(path)


@given(st.text())
def test_any_text_is_a_path_or_refused(text: str) -> None:
    """No text ends in another error than ours."""
    with contextlib.suppress(ConfigError):
        assert parse_path(text)
