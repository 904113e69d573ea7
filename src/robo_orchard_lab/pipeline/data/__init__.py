"""Exact data order: batches that follow from (seed, epoch), from any position on."""

from robo_orchard_lab.pipeline.data.order import DataOrder, KeyedBy, StepSizes
from robo_orchard_lab.pipeline.data.training_data import TrainingData

__all__ = ["DataOrder", "KeyedBy", "StepSizes", "TrainingData"]
