"""Reproducible data order: batches depend on (seed, epoch) and resume at any step.

- ``training_data``: :class:`TrainingData`, the interface to the trainer
- ``map_data``, ``epoch_batches``: map-style datasets, with random access
- ``stream_data``: iterable datasets, lists and custom loaders
- ``order``: :class:`DataOrder`; indices of an epoch and their split into steps and processes
- ``loader``: the user's loader, without Accelerate's wrappers, and its shard
- ``fetching``: loading of a batch, and start of worker processes
- ``worker_batches``, ``slots``: batches from workers, loaded ahead and sent in shared memory
- ``evaluation_loader``: batches of an evaluation, divided among the ranks
- ``rng``: seeds, RNG isolation, and generators that datasets hold
"""

from robo_orchard_lab.pipeline.data.order import DataOrder, KeyedBy, StepSizes
from robo_orchard_lab.pipeline.data.training_data import TrainingData

__all__ = ["DataOrder", "KeyedBy", "StepSizes", "TrainingData"]
