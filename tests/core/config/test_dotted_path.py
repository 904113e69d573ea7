"""Dotted paths, as typed and as shown in errors."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_core.utils.config.errors import dotted, parse_path


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5)
)
def test_parse_path_inverts_dotted(path: list[str]) -> None:
    """The dotted path in an error parses to the same keys."""
    assert parse_path(dotted(path)) == tuple(path)


@given(st.text())
def test_parse_path_raises_only_config_errors(text: str) -> None:
    """Any text is a path or a ConfigError."""
    with contextlib.suppress(ConfigError):
        assert parse_path(text)
