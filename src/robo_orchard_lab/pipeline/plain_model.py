"""The model as its author wrote it, without what was wrapped around it for the run."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_lab.pipeline.context import PipelineRun


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
