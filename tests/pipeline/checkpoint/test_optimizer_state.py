"""State of an optimizer by the names of its parameters."""

from __future__ import annotations

import torch

from robo_orchard_lab.pipeline.checkpoint import load_named_optimizer_state, named_optimizer_state


def make(groups: int) -> tuple[dict[torch.nn.Parameter, str], torch.optim.Optimizer]:
    """Return named parameters, and an optimizer with a state that has them in groups of 3."""
    parameters = [torch.nn.Parameter(torch.randn(2)) for _ in range(3 * groups)]
    of_groups = [{"params": parameters[i::groups], "lr": 0.1 * (1 + i)} for i in range(groups)]
    optimizer = torch.optim.AdamW(of_groups)
    torch.cat([*parameters]).square().sum().backward()
    optimizer.step()
    return {parameter: f"p{index}" for index, parameter in enumerate(parameters)}, optimizer


def test_a_loaded_parameter_is_not_searched_in_a_list() -> None:
    """Indices of each group are a range, since torch looks up each one; the state is complete."""
    names, optimizer = make(groups=2)
    other_names, other = make(groups=2)
    state = load_named_optimizer_state(other, other_names, named_optimizer_state(optimizer, names))
    assert [group["params"] for group in state["param_groups"]] == [range(3), range(3, 6)]
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    for (_, found), (_, saved) in zip(other.state.items(), optimizer.state.items(), strict=True):
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in saved.items()
        }
    assert [group["params"] for group in other.state_dict()["param_groups"]] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
