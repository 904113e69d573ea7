"""The names of the parameters that a run trains."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch

from robo_orchard_lab.pipeline.checkpoint import parameters_beside
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.model import plain_model, plain_name


def trained_parameters(run: PipelineRun) -> Iterable[torch.nn.Parameter]:
    """Those that :func:`trained_names` names, in half its time."""
    groups = [] if run.optimizer is None else run.optimizer.param_groups
    beside = [parameter for group in groups for parameter in group["params"]]
    every = chain(run.model.parameters(), beside)
    return {id(parameter): parameter for parameter in every}.values()  # hash() calls Python


def trained_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of all parameters that are trained, the model's and others."""
    names = _names_of_model(run)
    return {**names, **_beside(run, names)}


def names_beside(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of parameters that the optimizer has, and the model has not, such as of a learned loss."""
    return _beside(run, _names_of_model(run))


def _names_of_model(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}


def _beside(
    run: PipelineRun, names: dict[torch.nn.Parameter, str]
) -> dict[torch.nn.Parameter, str]:
    return {} if run.optimizer is None else parameters_beside(run.optimizer, names)
