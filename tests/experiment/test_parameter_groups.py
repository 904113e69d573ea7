"""Parameter groups for an optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.experiment.optimizers import parameter_groups


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.memory = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight  # tied


class OwnRMSNorm(nn.Module):
    """A user's normalization layer, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.gate = nn.Linear(4, 4, bias=False)


def names_by_group(
    model: nn.Module, groups: Mapping[str, Mapping[str, Any]]
) -> list[tuple[list[str], dict[str, Any]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ([names[parameter] for parameter in group.pop("params")], group)
        for group in parameter_groups(model, groups)
    ]


def test_optimizer_without_groups_has_one_group() -> None:
    """All parameters are in one group in the model's order, frozen parameters included."""
    model = Encoder()
    model.norm.requires_grad_(False)
    [group] = parameter_groups(model, {})
    assert group == {"params": list(model.parameters())}


def test_the_first_matching_group_gets_a_parameter() -> None:
    """Unmatched parameters come first, then each group in order with its options."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    groups: dict[str, dict[str, Any]] = {
        "no_decay": {"parameters": "norms_and_biases", "weight_decay": 0.0},
        "head": {"parameters": ["2.*"], "lr": 0.5, "betas": [0.9, 0.99]},
    }
    assert names_by_group(model, groups) == [
        (["0.weight"], {}),
        (["0.bias", "1.weight", "1.bias", "2.bias"], {"weight_decay": 0.0}),
        (["2.weight"], {"lr": 0.5, "betas": [0.9, 0.99]}),
    ]


def test_no_default_group_if_all_parameters_match() -> None:
    """No default group is added if all parameters match."""
    model = nn.Linear(2, 2)
    groups: dict[str, dict[str, Any]] = {
        "weights": {"parameters": "weight"},
        "biases": {"parameters": ["bias"]},
    }
    assert names_by_group(model, groups) == [(["weight"], {}), (["bias"], {})]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Conv2d(2, 2, 1), {"bias"}),
        (nn.Linear(2, 2, bias=True), {"bias"}),
        (nn.BatchNorm2d(2), {"weight", "bias"}),
        (nn.SyncBatchNorm(2), {"weight", "bias"}),
        (nn.GroupNorm(1, 2), {"weight", "bias"}),
        (nn.InstanceNorm3d(2, affine=True), {"weight", "bias"}),
        (nn.LayerNorm([2, 3]), {"weight", "bias"}),
        (nn.RMSNorm(2), {"weight"}),
        (nn.Sequential(OwnRMSNorm()), {"0.weight"}),
        (
            Encoder(),
            {
                *("attention.in_proj_bias", "attention.out_proj.bias", "memory.bias_ih_l0"),
                *("memory.bias_hh_l0", "norm.weight", "norm.bias", "head.bias"),
            },
        ),
    ],
)
def test_norms_and_biases_match_their_parameters(model: nn.Module, expected: set[str]) -> None:
    """The parameters of any normalization layer and every bias match."""
    found = names_by_group(model, {"group": {"parameters": "norms_and_biases", "lr": 1.0}})
    [group] = [names for names, options in found if options]
    assert set(group) == expected


def test_a_tied_parameter_is_found_by_each_of_its_names() -> None:
    """A tied parameter matches by each of its names."""
    found = names_by_group(Encoder(), {"head": {"parameters": ["head.weight"], "lr": 1.0}})
    assert found[1] == (["embedding.weight"], {"lr": 1.0})


def test_patterns_match_names_of_the_unwrapped_model() -> None:
    """A compiled model has the groups of the original model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = {"first": {"parameters": ["0.*"]}}
    plain = parameter_groups(model, groups)
    compiled: Any = torch.compile(model, backend="eager")
    assert parameter_groups(compiled, groups) == plain


@pytest.mark.parametrize(
    ("groups", "place", "message"),
    [
        ({"a": {"parameters": "head.weights"}}, "a.parameters", "did you mean 'head.weight'"),
        ({"a": {"parameters": ["norm.*", "head"]}}, "a.parameters", "'head' matches no"),
        ({"a": {"parameters": ["head"]}}, "a.parameters", "a module; did you mean 'head.*'?"),
        (
            {"a": {"parameters": ["*.bias"]}, "b": {"parameters": ["norm.bias"]}},
            "b.parameters",
            "belong to earlier groups (a)",
        ),
    ],
)
def test_a_group_without_parameters_is_refused(
    groups: Mapping[str, Mapping[str, Any]], place: str, message: str
) -> None:
    """The error names the group and the nearest names."""
    with pytest.raises(ConfigFieldError, match=re.escape(message)) as error:
        parameter_groups(Encoder(), groups)
    assert error.value.location == place


def test_norms_and_biases_must_match_a_parameter() -> None:
    """The keyword is refused in a model without norms and biases."""
    with pytest.raises(ConfigFieldError, match="'norms_and_biases' matches no parameter"):
        parameter_groups(nn.Linear(2, 2, bias=False), {"a": {"parameters": "norms_and_biases"}})


NAMES = [name for name, _ in Encoder().named_parameters()]
PATTERNS = st.sampled_from([*NAMES, *(f"{name.split('.')[0]}.*" for name in NAMES), "*.bias"])
CHOICES = st.lists(
    st.one_of(st.just("norms_and_biases"), st.lists(PATTERNS, min_size=1)), max_size=4
)


@given(CHOICES, st.sets(st.sampled_from(NAMES)))
def test_each_parameter_is_in_one_group(choices: list[Any], frozen: set[str]) -> None:
    """Each parameter is in exactly one group for any patterns."""
    model = Encoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    groups = {f"g{number}": {"parameters": choice} for number, choice in enumerate(choices)}
    try:
        found = parameter_groups(model, groups)
    except ConfigFieldError as error:
        assert "earlier groups" in error.problem  # noqa: PT017 - an accepted outcome
        return
    parameters = [parameter for group in found for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(model.parameters())
    torch.optim.AdamW(found)
