"""The model as its author wrote it, without what was wrapped around it for the run."""

from __future__ import annotations

import torch

from robo_orchard_lab.pipeline.context import PipelineRun


def plain_model(run: PipelineRun) -> torch.nn.Module:
    """The model without the wrappers of several processes and of compilation.

    Parts that were compiled one by one stay so; :func:`plain_name` mends their names.
    """
    model: torch.nn.Module = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return model


def plain_name(name: str) -> str:
    """The name of a parameter or buffer without what compilation puts into it.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace("_orig_mod.", "")
