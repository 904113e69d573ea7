"""Measuring a model on whole sets of data, alone or within a training run."""

from robo_orchard_lab.pipeline.evaluator.evaluator import Evaluator
from robo_orchard_lab.pipeline.evaluator.loaders import check_dataloaders

__all__ = ["Evaluator", "check_dataloaders"]
