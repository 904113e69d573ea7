"""An optimizer's state by the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from robo_orchard_lab.pipeline.errors import StateError


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
