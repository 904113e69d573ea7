"""The random state of a process."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import StateError

# --- state tree ------------------------------------------------------------------------------
# Nested states as JSON and tensors, exactly and back.


RESERVED_NAME = "__metadata__"
"""What safetensors keeps for itself among the names of tensors."""

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


# --- optimizer state -------------------------------------------------------------------------
# An optimizer's state by the names of the parameters.


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, Any]:
    """The optimizer's state with the names of parameters in place of their numbers.

    Args:
        optimizer: any torch optimizer.
        names: of the model's parameters. One that the model does not have (a learned loss, say)
            goes by its place, as in ``group1.param0``.
    """
    state = optimizer.state_dict()
    by_number = _names_by_number(optimizer, names)
    return {
        "state": {by_number[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [by_number[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.nn.Parameter, str],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """What to give to the optimizer's ``load_state_dict`` for a state by names.

    Groups are matched by their parameters, whatever order they and their parameters stand in.

    Raises:
        StateError: the groups hold other parameters than those saved, which are named.
    """
    by_number = _names_by_number(optimizer, names)
    live = optimizer.state_dict()["param_groups"]
    saved = {frozenset(group["params"]): group for group in state["param_groups"]}
    groups = []
    for group in live:
        members = frozenset(by_number[number] for number in group["params"])
        if members not in saved:
            known = {name for names_of_group in saved for name in names_of_group}
            raise StateError(
                "the optimizer has a parameter group that was not saved: "
                f"not saved: {', '.join(sorted(members - known)) or 'none'}; "
                f"saved in other groups: {', '.join(sorted(members & known)) or 'none'}"
            )
        groups.append({**saved.pop(members), "params": group["params"]})
    if saved:
        rest = sorted(name for names_of_group in saved for name in names_of_group)
        raise StateError(
            f"the optimizer lacks saved parameter groups, with {', '.join(rest) or 'no parameters'}"
        )
    numbers = {name: number for number, name in by_number.items()}
    return {
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": groups,
    }


def parameters_beside(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[torch.nn.Parameter, str]:
    """The parameters that an optimizer has and a model has not, by their places in its groups.

    Args:
        optimizer: any torch optimizer.
        names: of the model's parameters.
    """
    return {
        parameter: f"group{i}.param{j}"
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
        if parameter not in names
    }


def _names_by_number(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[int, str]:
    """The names in the order in which the optimizer numbers its parameters."""
    known = {**parameters_beside(optimizer, names), **names}
    ordered = [known[p] for group in optimizer.param_groups for p in group["params"]]
    return dict(enumerate(ordered))


def capture_random_state() -> dict[str, Any]:
    """Where torch, NumPy and Python are in their streams.

    Of CUDA devices, it is that of the current one, which is this process's: reading those of all
    makes a context on each of them.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": _plain(np.random.get_state(legacy=True)),
        "python": random.getstate(),
    }


def keyed_random_state(key: str) -> dict[str, Any]:
    """A state such as :func:`capture_random_state` gives, at the beginning of streams of a key.

    Those of other keys have nothing to do with them.
    """
    digest = blake2b(key.encode(), digest_size=32).digest()
    seeds = [int.from_bytes(digest[begin : begin + 8], "little") for begin in range(0, 32, 8)]
    devices = ["cuda"] if torch.cuda.is_available() else []
    return {
        "torch": torch.Generator().manual_seed(seeds[0]).get_state(),
        "cuda": [torch.Generator(name).manual_seed(seeds[1]).get_state() for name in devices],
        "numpy": _plain(np.random.RandomState(seeds[2] & 0xFFFFFFFF).get_state(legacy=True)),
        "python": random.Random(seeds[3]).getstate(),
    }


def check_random_state(state: Mapping[str, Any]) -> None:
    """Refuse a state of other devices than there are.

    Raises:
        StateError: the message says what was saved and what there is.
    """
    if bool(state["cuda"]) != torch.cuda.is_available():
        saved, here = ("with", "without") if state["cuda"] else ("without", "with")
        raise StateError(
            f"the run was saved {saved} a CUDA device and is resumed {here} one, which draws other "
            "random numbers; resume it on the same kind of device"
        )


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing from where :func:`capture_random_state` was called."""
    torch.set_rng_state(state["torch"])
    for of_device in state["cuda"]:
        torch.cuda.set_rng_state(of_device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's, as what can be saved."""
    name, keys, *rest = state
    return (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
