"""Model helpers: unwrapping, parameter names and patterns, and snapshots of buffers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from operator import is_
from typing import Any, TypeAlias

import torch
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_lab.pipeline.context import PipelineRun

NamedParameters: TypeAlias = Sequence[tuple[str, torch.nn.Parameter]]


def plain_model(run: PipelineRun) -> torch.nn.Module:
    """Return the model without the wrappers of DDP and ``torch.compile``.

    Submodules compiled one by one stay compiled; :func:`plain_name` removes their prefix.
    """
    model: torch.nn.Module = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return model


def ddp_of(model: torch.nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper of a model, also inside ``torch.compile``, or None."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def plain_name(name: str) -> str:
    """Return a parameter or buffer name without the prefix of ``torch.compile``.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace("_orig_mod.", "")


def plain_state(run: PipelineRun) -> dict[str, Any]:
    """Return the model's ``state_dict`` by plain names, without a copy."""
    return {plain_name(name): value for name, value in plain_model(run).state_dict().items()}


def plain_weights(run: PipelineRun) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by plain names, without a copy."""
    return {n: value for n, value in plain_state(run).items() if isinstance(value, torch.Tensor)}


def all_named_parameters(model: torch.nn.Module) -> NamedParameters:
    """Return all parameters with plain names; a tied parameter occurs under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return [(plain_name(name), parameter) for name, parameter in named]


def match_parameters(pattern: str, named: NamedParameters) -> list[torch.nn.Parameter]:
    """Return parameters by pattern: ``*`` matches any text with dots, ``?`` one character.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False))
    >>> len(match_parameters("*.weight", all_named_parameters(model)))
    2
    """
    return [parameter for name, parameter in named if fnmatchcase(name, pattern)]


def suggest_pattern(pattern: str, named: NamedParameters) -> str:
    """Return the remedy for a pattern without matches, for error messages."""
    names = [name for name, _ in named]
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    if pattern in modules:
        return f"that is a module; did you mean '{pattern}.*'?"
    near = difflib.get_close_matches(pattern, [*names, *(f"{m}.*" for m in sorted(modules))], n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"the parameters are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


class BufferSnapshot:
    """Copies of a model's buffers on their device.

    All buffers are copied: batch normalization changes its running statistics without a trace in
    the version counters of the tensors.
    """

    def __init__(self) -> None:
        self._owners: list[tuple[torch.nn.Module, str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] | None = None
        self._loaded: Mapping[str, torch.Tensor] | None = None

    def attach(self, model: torch.nn.Module) -> None:
        """Collect the buffers of a model."""
        self._owners = [
            (module, name, plain_name(f"{path}.{name}" if path else name))
            for path, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
        ]
        if self._loaded is not None:
            self._live = self._current()
            self._copies = [
                self._loaded[full].to(live.device)
                for (_, _, full), live in zip(self._owners, self._live, strict=True)
            ]
            self._loaded = None

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers, without a device sync."""
        live = self._current()
        if self._copies is not None and all(map(is_, live, self._live)):
            if live:
                torch._foreach_copy_(self._copies, live)
        else:  # the first time, or after a forward pass replaced a buffer
            self._live, self._copies = live, [buffer.clone() for buffer in live]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back into the model."""
        for (module, name, _), copy in zip(self._owners, self._copies or (), strict=False):
            live = getattr(module, name)
            if live is not None and live.shape == copy.shape:
                live.copy_(copy)
            else:
                setattr(module, name, copy.clone())

    def named(self) -> dict[str, torch.Tensor]:
        """Return the copies by plain name; the next :meth:`save` overwrites the tensors."""
        return {
            full: copy for (_, _, full), copy in zip(self._owners, self._copies or (), strict=False)
        }

    def load(self, named: Mapping[str, torch.Tensor]) -> None:
        """Use copies from :meth:`named` at the next :meth:`attach`."""
        self._loaded = named

    def _current(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name, _ in self._owners]
