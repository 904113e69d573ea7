"""The names of the parameters that a run trains."""

from __future__ import annotations

import torch

from robo_orchard_lab.pipeline.checkpoint import parameters_beside
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.plain_model import plain_model, plain_name


def trained_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of all parameters that are trained, the model's and others."""
    return {**_names_of_model(run), **names_beside(run)}


def names_beside(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of parameters that the optimizer has, and the model has not, such as of a learned loss."""
    return {} if run.optimizer is None else parameters_beside(run.optimizer, _names_of_model(run))


def _names_of_model(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}
