"""Choosing parameters of a model by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch

from robo_orchard_lab.pipeline.plain_model import plain_name

NamedParameters: TypeAlias = Sequence[tuple[str, torch.nn.Parameter]]


def all_names(model: torch.nn.Module) -> NamedParameters:
    """Every parameter by its name in the plain model; one that is tied by each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return [(plain_name(name), parameter) for name, parameter in named]


def matching(pattern: str, named: NamedParameters) -> list[torch.nn.Parameter]:
    """Those of which a name matches: ``*`` is any text, dots included, ``?`` one character.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False))
    >>> len(matching("*.weight", all_names(model)))
    2
    """
    return [parameter for name, parameter in named if fnmatchcase(name, pattern)]


def nearest_names(pattern: str, named: NamedParameters) -> str:
    """What to write in the place of a pattern that matches nothing, for errors."""
    names = [name for name, _ in named]
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    if pattern in modules:
        return f"that is a module; did you mean '{pattern}.*'?"
    near = difflib.get_close_matches(pattern, [*names, *(f"{m}.*" for m in sorted(modules))], n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"the parameters are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
