"""Savable state: optimizer state by parameter name, and RNG state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from types import NoneType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from torch.nn.parameter import is_lazy

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.progress import MAX_COUNT
from robo_orchard_lab.pipeline.state_schema import (
    StateSchema,
    Text,
    check_similar,
    errors_of,
)

# --- optimizer state by parameter name -------------------------------------------------------


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, Any]:
    """Return the optimizer's state dict with parameter names instead of indices.

    Args:
        optimizer: any torch optimizer.
        names: names of the model's parameters. Another parameter, of a learned loss for example,
            is named by its position, such as ``group1.param0``.
    """
    state = optimizer.state_dict()
    by_index = _names_by_index(optimizer, names)
    return {
        "state": {by_index[index]: value for index, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [by_index[index] for index in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _named_group(group: dict[str, Any]) -> dict[str, Any]:
    names = group.get("params")
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise ValueError("expected a group with the names of its params")
    return group


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.nn.Parameter, str],
    state: Mapping[str, Any],
    path: str = "optimizer",
) -> dict[str, Any]:
    """Convert a named state to an argument of the optimizer's ``load_state_dict``.

    Groups are matched by their parameters, in any order. Errors name the state by ``path``.

    Raises:
        StateError: the groups differ from the saved ones; the message names the parameters.
    """
    by_index = _names_by_index(optimizer, names)
    live = optimizer.state_dict()["param_groups"]
    _OPTIMIZER.check(state, path)
    is_of_torch = type(optimizer).__module__.startswith("torch.optim")
    saved = {frozenset(group["params"]): group for group in state["param_groups"]}
    groups: list[dict[str, Any]] = []
    for group in live:
        members = frozenset(by_index[index] for index in group["params"])
        if members not in saved:
            known = {name for names_of_group in saved for name in names_of_group}
            raise StateError(
                f"the {path} has a parameter group that was not saved: "
                f"not saved: {', '.join(sorted(members - known)) or 'none'}; "
                f"saved in other groups: {', '.join(sorted(members & known)) or 'none'}"
            )
        found = saved.pop(members)
        where = f"{path}.param_groups.{len(groups)}"
        # A newer torch may have added options, which are off by default.
        if lost := sorted(name for name in group if group[name] and name not in found):
            raise StateError(f"{where}.{lost[0]}: expected a value, found none")
        for name, value in group.items():
            if name in found and name != "params":
                check_similar(value, found[name], f"{where}.{name}", strict=is_of_torch)
                if value is None and is_of_torch and not isinstance(found[name], (bool, NoneType)):
                    raise StateError(f"{where}.{name}: expected None, found {found[name]!r:.60}")
        indices_of_group = _consecutive(group["params"]) if is_of_torch else group["params"]
        groups.append({**found, "params": indices_of_group})
    if saved:
        rest = sorted(name for names_of_group in saved for name in names_of_group)
        raise StateError(
            f"the {path} lacks saved parameter groups, with {', '.join(rest) or 'no parameters'}"
        )
    indices = {name: index for index, name in by_index.items()}
    parameters = dict(zip(indices, _parameters_of(optimizer), strict=True))
    for name, of_one in state["state"].items():
        if name not in indices:
            raise StateError(f"{path}.state.{name:.80}: the optimizer has no such parameter")
        _check_parameter_state(optimizer, parameters[name], of_one, f"{path}.state.{name}")
    return {
        "state": {indices[name]: value for name, value in state["state"].items()},
        "param_groups": groups,
    }


def _consecutive(indices: list[int]) -> Sequence[int]:
    """Return consecutive indices as a range.

    ``load_state_dict`` looks each index up in its group: of 100,000 parameters, for 46 s in a list.
    """
    first = indices[0] if indices else 0
    found = range(first, first + len(indices))
    return found if [*found] == indices else indices


_OPTIMIZER = StateSchema(
    state=dict[Text, dict[Text, Any]],
    param_groups=list[Annotated[dict[Text, Any], AfterValidator(_named_group)]],
)
_NUMBERS = {"step", "eta", "mu", "mu_product"}
"""Entries of torch's optimizers that are single numbers, or tensors of one."""


def _check_parameter_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: Mapping[str, Any], where: str
) -> None:
    """Check the state of a parameter, for the optimizers of torch that keep it elementwise."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    if type(optimizer).__name__ in ("Adafactor", "LBFGS") or is_lazy(parameter):
        return
    for name, value in state.items():
        if name in _NUMBERS:
            number = value.numel() == 1 if isinstance(value, torch.Tensor) else value
            if isinstance(number, (bool, int, float)) and 0 <= number <= MAX_COUNT:
                continue
            raise StateError(f"{where}.{name}: expected a number, found {value!r:.60}")
        if value is None:  # an empty momentum buffer
            continue
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            found = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise StateError(
                f"{where}.{name}: expected a tensor of shape {list(parameter.shape)}, found "
                f"{found!s:.60}"
            )


def parameters_beside(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[torch.nn.Parameter, str]:
    """Name the optimizer's parameters outside the model by their positions in its groups.

    Args:
        optimizer: any torch optimizer.
        names: names of the model's parameters.
    """
    return {
        parameter: f"group{i}.param{j}"
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
        if parameter not in names
    }


def _names_by_index(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[int, str]:
    known = {**parameters_beside(optimizer, names), **names}
    return dict(enumerate(known[p] for p in _parameters_of(optimizer)))


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --- RNG state -------------------------------------------------------------------------------


_RANDOM = StateSchema(torch=torch.Tensor, cuda=list[torch.Tensor], numpy=tuple, python=tuple)


def capture_random_state() -> dict[str, Any]:
    """Return the global RNG state of torch, NumPy and Python.

    Of CUDA devices, only the current one is read: reading all would create a context on each.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": _plain(np.random.get_state(legacy=True)),
        "python": _python_state(),
    }


def _python_state() -> tuple[Any, ...]:
    """Return the state of Python's RNG; of two equivalent states between two blocks, the latter.

    Loading data may replace one by the other.
    """
    state = random.getstate()
    if state[1][-1] < 624:  # the position in the block
        return state
    following = random.Random()
    following.setstate(state)
    following.getrandbits(32)  # makes the next block
    version, (*words, _), gauss = following.getstate()
    return version, (*words, 0), gauss


def keyed_random_state(key: str) -> dict[str, Any]:
    """Derive an RNG state, as of :func:`capture_random_state`, from a key.

    States of different keys are independent.
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
    """Refuse an RNG state that :func:`restore_random_state` can't set; changes nothing.

    Raises:
        StateError: CUDA is available now and was not when saving, or the reverse; or the state is
            invalid.
    """
    _RANDOM.check(state, "random")
    if bool(state["cuda"]) != torch.cuda.is_available():
        saved, here = ("with", "without") if state["cuda"] else ("without", "with")
        raise StateError(
            f"the run was saved {saved} a CUDA device and is resumed {here} one, so its random "
            "numbers would differ; resume it on the same kind of device"
        )

    with errors_of("random.torch"):
        torch.Generator().set_state(state["torch"])
    with errors_of("random.cuda"):
        for of_device in state["cuda"]:
            torch.Generator("cuda").set_state(of_device)
    with errors_of("random.numpy"):
        name, keys, position, *rest = state["numpy"]
        if keys.dtype != torch.int64 or type(position) is not int or not 0 <= position <= 624:
            raise StateError("random.numpy: expected keys and a position from 0 to 624")
        native = (name, keys.numpy().astype(np.uint32), position, *rest)
        np.random.RandomState().set_state(native)
    with errors_of("random.python"):
        random.Random().setstate(state["python"])


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the global RNG state of torch, NumPy and Python."""
    torch.set_rng_state(state["torch"])
    for of_device in state["cuda"]:
        torch.cuda.set_rng_state(of_device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _plain(state: Any) -> tuple[Any, ...]:
    """Convert NumPy's RNG state to types of a state tree."""
    name, keys, *rest = state
    return (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
