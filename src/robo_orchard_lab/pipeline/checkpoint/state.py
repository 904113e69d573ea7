"""The random state of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import StateError

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
