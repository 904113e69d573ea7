"""Choosing parameters of a model by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from operator import is_
from typing import Any, TypeAlias

import torch
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_lab.pipeline.context import PipelineRun

# --- plain model -----------------------------------------------------------------------------
# The model as its author wrote it, without what was wrapped around it for the run.


def plain_model(run: PipelineRun) -> torch.nn.Module:
    """The model without the wrappers of several processes and of compilation.

    Parts that were compiled one by one stay so; :func:`plain_name` mends their names.
    """
    model: torch.nn.Module = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return model


def ddp_of(model: torch.nn.Module) -> DistributedDataParallel | None:
    """The DDP that a model is in, also where that is compiled; None where there is none."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def plain_name(name: str) -> str:
    """The name of a parameter or buffer without what compilation puts into it.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace("_orig_mod.", "")


def plain_state(run: PipelineRun) -> dict[str, Any]:
    """What the model's ``state_dict`` holds, by the names of the plain model; not copied."""
    return {plain_name(name): value for name, value in plain_model(run).state_dict().items()}


def plain_weights(run: PipelineRun) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers by the names of the plain model; not copied."""
    return {n: value for n, value in plain_state(run).items() if isinstance(value, torch.Tensor)}


# --- buffers ---------------------------------------------------------------------------------
# The buffers of a model as they were.


class BufferSnapshot:
    """Copies of a model's buffers, on their device, and putting them back.

    Which buffers a forward pass changes can't be told: the running statistics of batch
    normalisation change without a trace in the tensors' version counters. So all are copied.
    """

    def __init__(self) -> None:
        self._places: list[tuple[torch.nn.Module, str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] | None = None
        self._loaded: Mapping[str, torch.Tensor] | None = None

    def attach(self, model: torch.nn.Module) -> None:
        """Look up where the buffers are; :meth:`named` has the names of the plain model."""
        self._places = [
            (module, name, plain_name(f"{path}.{name}" if path else name))
            for path, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
        ]
        if self._loaded is not None:
            self._live = self._now()
            self._copies = [
                self._loaded[full].to(live.device)
                for (_, _, full), live in zip(self._places, self._live, strict=True)
            ]
            self._loaded = None

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers as they are; nothing is read from the device."""
        live = self._now()
        if self._copies is not None and all(map(is_, live, self._live)):
            if live:
                torch._foreach_copy_(self._copies, live)
        else:  # the first time, and where a forward pass sets new tensors in their place
            self._live, self._copies = live, [buffer.clone() for buffer in live]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back as they were when they were last copied."""
        for (module, name, _), copy in zip(self._places, self._copies or (), strict=False):
            live = getattr(module, name)
            if live is not None and live.shape == copy.shape:
                live.copy_(copy)
            else:
                setattr(module, name, copy.clone())

    def named(self) -> dict[str, torch.Tensor]:
        """The copies, which the next :meth:`save` changes."""
        return {
            full: copy for (_, _, full), copy in zip(self._places, self._copies or (), strict=False)
        }

    def load(self, named: Mapping[str, torch.Tensor]) -> None:
        """Take over copies that :meth:`named` gave, when attached to the same model."""
        self._loaded = named

    def _now(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name, _ in self._places]


NamedParameters: TypeAlias = Sequence[tuple[str, torch.nn.Parameter]]


def all_named_parameters(model: torch.nn.Module) -> NamedParameters:
    """Every parameter by its name in the plain model; one that is tied by each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return [(plain_name(name), parameter) for name, parameter in named]


def match_parameters(pattern: str, named: NamedParameters) -> list[torch.nn.Parameter]:
    """Those of which a name matches: ``*`` is any text, dots included, ``?`` one character.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False))
    >>> len(match_parameters("*.weight", all_named_parameters(model)))
    2
    """
    return [parameter for name, parameter in named if fnmatchcase(name, pattern)]


def suggest_pattern(pattern: str, named: NamedParameters) -> str:
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
