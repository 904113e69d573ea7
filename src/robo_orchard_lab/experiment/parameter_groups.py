"""Parameters with options of their own, such as no weight decay, as groups for an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.pipeline.model import NamedParameters, all_names, matching, nearest_names

NORMS_AND_BIASES = "norms_and_biases"
_NORM = re.compile(r"Norm(\dd)?$")
_BIAS = re.compile(r"(^|\.)(bias_[^.]*|([^.]*_)?bias)$")


def parameter_groups(
    model: torch.nn.Module, groups: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The groups that torch's optimizers take, in an order that a resumed run finds again.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> groups = parameter_groups(model, {
    ...     "no_decay": {"parameters": "norms_and_biases", "weight_decay": 0.0},
    ... })
    >>> [(len(group.pop("params")), group) for group in groups]
    [(1, {}), (3, {'weight_decay': 0.0})]

    Each parameter is in one group: the first of ``groups`` that it matches. First come those that
    match none, with the optimizer's own options, if there are any; then the others as they are
    listed. Parameters that are frozen are among them, as in ``model.parameters()``: without a
    gradient, an optimizer passes them over.

    Args:
        model: whose parameters to divide.
        groups: by name. ``"parameters"`` is a pattern or a list of them: names of parameters, with
            ``*`` for any text, dots included, ``?`` for one character and ``[ab]`` for one of some.
            The word ``"norms_and_biases"`` stands for the parameters of normalization layers
            (modules of a class that is named like ``LayerNorm`` or ``BatchNorm2d``, or has a base
            that is) and those named ``bias``, ``..._bias`` or ``bias_...``. All else are options
            of the optimizer.

    Raises:
        ConfigFieldError: a pattern matches nothing, or a group gets no parameter since all that it
            matches are in groups ahead of it. The path begins with the group's name.
    """
    named = all_names(model)
    group_of: dict[torch.nn.Parameter, str] = {}
    for name, group in groups.items():
        matched = list(_matched(model, named, name, group["parameters"]))
        free = [parameter for parameter in matched if parameter not in group_of]
        if not free:
            ahead = ", ".join(dict.fromkeys(group_of[parameter] for parameter in matched))
            raise ConfigFieldError(
                f"all that it matches are in groups ahead of it ({ahead}), so that none is left; "
                "list it ahead of these, or leave it out",
                (name, "parameters"),
            )
        group_of |= dict.fromkeys(free, name)
    members: dict[str | None, list[torch.nn.Parameter]] = {name: [] for name in (None, *groups)}
    for parameter in model.parameters():
        members[group_of.get(parameter)].append(parameter)
    rest = members.pop(None)
    divided: list[dict[str, Any]] = [{"params": rest}] if rest else []
    for name, group in groups.items():
        options = {option: value for option, value in group.items() if option != "parameters"}
        divided.append({"params": members[name], **options})
    return divided


def _matched(
    model: torch.nn.Module, named: NamedParameters, group: str, patterns: str | Sequence[str]
) -> Iterator[torch.nn.Parameter]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        norms_and_biases = pattern == NORMS_AND_BIASES
        found = _norms_and_biases(model) if norms_and_biases else matching(pattern, named)
        if not found:
            advice = "" if norms_and_biases else f"; {nearest_names(pattern, named)}"
            raise ConfigFieldError(
                f"{pattern!r} matches no parameter of the model{advice}", (group, "parameters")
            )
        yield from found


def _norms_and_biases(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    biases = [parameter for name, parameter in all_names(model) if _BIAS.search(name)]
    norms = [module for module in model.modules() if _is_norm(type(module))]
    return biases + [p for norm in norms for p in norm.parameters(recurse=False)]


def _is_norm(cls: type) -> bool:
    return any(_NORM.search(base.__name__) for base in cls.__mro__)
