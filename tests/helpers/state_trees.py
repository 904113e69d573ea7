"""Generated state trees, and their comparison."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["$float", "$tensor", "$dict"])
)
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
states = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(scalars.filter(lambda key: key == key), inner, max_size=3)
        | st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Return True if values and types are equal at every level."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return bool(a == b)
