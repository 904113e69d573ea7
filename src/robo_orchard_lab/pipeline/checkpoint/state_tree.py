"""Nested states as JSON and tensors, exactly and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.checkpoint.tensor_layout import RESERVED_NAME
from robo_orchard_lab.pipeline.errors import StateError

# What JSON can't say is an object with one key that starts with this.
_MARK = "$"


def encode_state(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state as a JSON document and the tensors that it refers to by their place in it.

    A state is made of None, bool, int, float, str, tensors, lists, tuples, and mappings with such
    keys; ``collections.Counter`` keeps its type. NumPy's numbers come back as Python's.

    Raises:
        StateError: anything else is in it; the message names its place.

    >>> encode_state({"best": float("inf"), "seen": (1, 2)})
    ({'best': {'$float': 'inf'}, 'seen': {'$tuple': [1, 2]}}, {})
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(state, "", tensors), tensors


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        name, count = place, 1
        # Keys with dots in them, or 1 beside "1", give one place twice.
        while name in tensors or name == RESERVED_NAME:
            count += 1
            name = f"{place}#{count}"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return _encode(value.item(), place, tensors)

    def child(key: object, item: Any) -> Any:
        return _encode(item, f"{place}.{key}" if place else str(key), tensors)

    if type(value) in (list, tuple):
        items = [child(index, item) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        plain = all(type(key) is str and not key.startswith(_MARK) for key in value)
        if plain and type(value) is not Counter:
            return {key: child(key, item) for key, item in value.items()}
        pairs = [
            [_encode(key, f"{place}.{key}", tensors), child(key, item)]
            for key, item in value.items()
        ]
        return {"$counter" if type(value) is Counter else "$dict": pairs}
    raise StateError(
        f"{place or 'the state'} can't be saved: expected None, bool, int, float, str, a tensor, "
        f"list, tuple or mapping, found {type(value).__name__}"
    )


def decode_state(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that :func:`encode_state` made the document and the tensors of.

    Raises:
        StateError: the document has a mark that is not known, or names a tensor that is not there.
    """
    if isinstance(document, list):
        return [decode_state(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    marks = [key for key in document if key.startswith(_MARK)]
    if not marks:
        return {key: decode_state(item, tensors) for key, item in document.items()}
    try:
        ((mark, content),) = document.items()
        if mark == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        if mark == "$tensor":
            return tensors[content]
        decoded = [decode_state(item, tensors) for item in content]
        if mark == "$tuple":
            return tuple(decoded)
        pairs = dict(decoded)
        if len(pairs) != len(decoded):
            raise ValueError("a key is there twice")
        return {"$dict": pairs, "$counter": Counter(pairs)}[mark]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"a saved state has an unknown value {document!r:.80}") from error
