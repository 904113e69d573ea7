"""The gradients that ranks have added up in an accumulation window that is open."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_part
from robo_orchard_lab.pipeline.sharding import (
    names_of_unreduced,
    set_unreduced_gradients,
    share_like,
    unreduced_gradients,
)
from robo_orchard_lab.pipeline.trainer.trained_names import trained_names


def own_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """What this rank alone has added up, whole, by the names of the parameters: the same of plain
    models and of those in shards. The job's are the mean of them."""
    found = {
        name: local_part(parameter.grad)
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and not _is_divided(parameter.grad)
    }
    return found | unreduced_gradients(plain_model(run))


def reduced_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """Those that the ranks have reduced already, which in shards stay so: of parameters that no
    update takes."""
    return {
        name: parameter.grad
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and _is_divided(parameter.grad)
    }


def check_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Refuse gradients that :func:`set_open_gradients` would find no place for.

    Raises:
        StateError: they are those of other parameters, which it names.
    """
    live = {name: parameter for parameter, name in trained_names(run).items()}
    unreduced = names_of_unreduced(plain_model(run)) if own else set()

    def fits(name: str, gradient: torch.Tensor) -> bool:
        return name in live and live[name].shape == gradient.shape

    lost = [name for name, gradient in reduced.items() if not fits(name, gradient)]
    lost += [
        name
        for name, gradient in own.items()
        if not fits(name, gradient) or (_is_divided(live[name]) and name not in unreduced)
    ]
    if lost:
        raise StateError(
            "the run was saved within an accumulation window, and the gradients of "
            f"{', '.join(lost)} have no place in this run's model; go on from a checkpoint "
            "between two windows"
        )


def set_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Have the backward passes that follow add to what was open."""
    unreduced: dict[str, torch.Tensor] = {}
    for parameter, name in trained_names(run).items():
        gradient, of_rank = reduced.get(name), own.get(name)
        if of_rank is not None and _is_divided(parameter):
            unreduced[name] = of_rank
        elif of_rank is not None:
            of_rank = share_like(parameter, of_rank)
            gradient = of_rank if gradient is None else gradient + of_rank
        parameter.grad = None if gradient is None else gradient.to(parameter)
    set_unreduced_gradients(plain_model(run), unreduced)


def _is_divided(tensor: torch.Tensor) -> bool:
    return is_sharded(tensor) and tensor.device_mesh.size() > 1
