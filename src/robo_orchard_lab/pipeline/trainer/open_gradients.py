"""The gradients that ranks have added up in an accumulation window that is open."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.plain_model import plain_model
from robo_orchard_lab.pipeline.sharded_model import (
    names_of_unreduced,
    set_unreduced_gradients,
    unreduced_gradients,
    whole_like,
)
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_part
from robo_orchard_lab.pipeline.trainer.trained_names import trained_names

_OWN = "own\x1f"
"""Begins the names of a rank's own gradients, which no one takes for those of parameters, and so
for something to divide as the parameter is."""


def open_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """What this rank has added up, the same of plain models and of those in shards.

    A rank's own gradients are whole, and the job's are the mean of them. Those that the ranks have
    reduced already, which in shards stay so, are those of parameters that no update takes.
    """
    found: dict[str, torch.Tensor] = {}
    for parameter, name in trained_names(run).items():
        gradient = parameter.grad
        if gradient is not None:
            is_own = not _is_divided(gradient)
            found[_own(name) if is_own else name] = local_part(gradient) if is_own else gradient
    for name, gradient in unreduced_gradients(plain_model(run)).items():
        found[_own(name)] = gradient
    return found


def check_open_gradients(run: PipelineRun, saved: Mapping[str, torch.Tensor]) -> None:
    """Refuse gradients that :func:`set_open_gradients` would find no place for.

    Raises:
        StateError: they are those of other parameters, which it names.
    """
    live = {name: parameter for parameter, name in trained_names(run).items()}
    unreduced = names_of_unreduced(plain_model(run)) if saved else set()
    lost = []
    for key, gradient in saved.items():
        name = _name(key)
        parameter = live.get(name)
        fits = parameter is not None and parameter.shape == gradient.shape
        if fits and key != name and parameter is not None and _is_divided(parameter):
            fits = name in unreduced
        if not fits:
            lost.append(name)
    if lost:
        raise StateError(
            "the run was saved within an accumulation window, and the gradients of "
            f"{', '.join(lost)} have no place in this run's model; go on from a checkpoint "
            "between two windows"
        )


def set_open_gradients(run: PipelineRun, saved: Mapping[str, torch.Tensor]) -> None:
    """Have the backward passes that follow add to what :func:`open_gradients` gave."""
    unreduced: dict[str, torch.Tensor] = {}
    for parameter, name in trained_names(run).items():
        gradient, own = saved.get(name), saved.get(_own(name))
        if own is not None and _is_divided(parameter):
            unreduced[name] = own
        elif own is not None:
            own = whole_like(parameter, own)
            gradient = own if gradient is None else gradient + own
        parameter.grad = None if gradient is None else gradient.to(parameter)
    set_unreduced_gradients(plain_model(run), unreduced)


def _is_divided(tensor: torch.Tensor) -> bool:
    return is_sharded(tensor) and tensor.device_mesh.size() > 1


def _own(name: str) -> str:
    return _OWN + name.replace(".", "\x1f")


def _name(key: str) -> str:
    return key.removeprefix(_OWN).replace("\x1f", ".") if key.startswith(_OWN) else key
