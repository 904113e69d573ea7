"""State trees: a state as a JSON document and named tensors, without torch where none is saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.pipeline.errors import StateError

if TYPE_CHECKING:
    import torch

RESERVED_NAME = "__metadata__"
"""Tensor name that safetensors reserves for the metadata of a header."""

# An object with a single key that starts with this mark stands for a value that JSON lacks.
_MARK = "$"


def encode_state(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Encode a state as a JSON document and the named tensors of the document.

    A state consists of None, bool, int, float, str, tensors, NumPy arrays of numbers, lists,
    tuples, and mappings with such keys; ``collections.Counter`` keeps its type. NumPy scalars
    become Python numbers.

    Raises:
        StateError: the state has another type of value; the message names its path.

    >>> encode_state({"best": float("inf"), "seen": (1, 2)})
    ({'best': {'$float': 'inf'}, 'seen': {'$tuple': [1, 2]}}, {})
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(state, "", tensors), tensors


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}

    prefix = f"{path}." if path else ""
    if type(value) in (list, tuple):
        items = [_encode(item, f"{prefix}{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        plain = all(type(key) is str and not key.startswith(_MARK) for key in value)
        if plain and type(value) is not Counter:
            return {key: _encode(item, f"{prefix}{key}", tensors) for key, item in value.items()}
        pairs = [
            [_encode(key, f"{path}.{key}", tensors), _encode(item, f"{prefix}{key}", tensors)]
            for key, item in value.items()
        ]
        return {"$counter" if type(value) is Counter else "$dict": pairs}
    return _encode_array(value, path, tensors)


def _encode_array(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    import numpy as np  # here, since describing a checkpoint needs neither NumPy nor torch
    import torch

    if type(value) is np.ndarray:
        if not value.flags.writeable:
            value = value.copy()  # torch warns otherwise
        with suppress(TypeError, ValueError):  # of an array of strings or objects; refused below
            tensor = torch.from_numpy(np.asarray(value, order="C"))
            return {"$numpy": _encode_array(tensor, path, tensors)["$tensor"]}
    if isinstance(value, torch.Tensor):
        name, count = path, 1
        # Keys with dots in them, or the keys 1 and "1", lead to the same path.
        while name in tensors or name == RESERVED_NAME:
            count += 1
            name = f"{path}#{count}"
        is_plain = type(value) is torch.Tensor and not value.requires_grad
        tensors[name] = value if is_plain else value.detach()  # costs 0.6 us
        return {"$tensor": name}
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return _encode(value.item(), path, tensors)
    raise StateError(
        f"{path or 'the state'} can't be saved: expected None, bool, int, float, str, a tensor, "
        f"NumPy array of numbers, list, tuple or mapping, found {type(value).__name__}"
    )


def decode_state(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Decode a document and tensors of :func:`encode_state` to the same state.

    Raises:
        StateError: the document has an unknown mark, or names a missing tensor.
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
        if mark == "$numpy":
            return tensors[content].numpy()
        decoded = [decode_state(item, tensors) for item in content]
        if mark == "$tuple":
            return tuple(decoded)
        pairs = dict(decoded)
        if len(pairs) != len(decoded):
            raise ValueError("duplicate key")
        return {"$dict": pairs, "$counter": Counter(pairs)}[mark]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"a saved state has an unknown value {document!r:.80}") from error
