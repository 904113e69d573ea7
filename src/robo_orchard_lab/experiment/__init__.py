"""Experiments: training runs as validated values and files."""

from robo_orchard_core.utils.config import config_of
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.parts import (
    AcceleratorConfig,
    CompileConfig,
    DataConfig,
    DataOrderConfig,
    InitialWeights,
    LoaderConfig,
    ParameterGroup,
    TrainerConfig,
)

__all__ = [
    "AcceleratorConfig",
    "CompileConfig",
    "DataConfig",
    "DataOrderConfig",
    "ExperimentConfig",
    "InitialWeights",
    "LoaderConfig",
    "ParameterGroup",
    "TrainerConfig",
    "config_of",
]
