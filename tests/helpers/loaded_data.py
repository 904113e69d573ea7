"""Helpers of the data tests: datasets that draw random numbers, and comparisons."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.progress import TrainerProgress


class Drawing(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of an index and of numbers drawn from torch, NumPy and Python."""

    def __init__(self, length: int = 26) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random()]
        return torch.tensor(index), torch.tensor(drawn, dtype=torch.float64)


class Indices(Dataset[int]):
    """Samples that equal their index, in a custom dataset."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def data_of(
    loader: Iterable[Any], order: DataOrder | None = None, progress: TrainerProgress | None = None
) -> TrainingData:
    """Return the data of a trainer; with seed 7 unless ``order`` is given."""
    return TrainingData(
        loader,
        DataOrder(seed=7) if order is None else order,
        Accelerator(cpu=True),
        TrainerProgress() if progress is None else progress,
    )


def local_sizes(data: TrainingData, step_id: int) -> list[float]:
    """Return this process's number of samples in each step, before loading."""
    return [sizes.local for sizes in data.step_sizes(step_id, ahead=True) or []]


def resumed(
    loader: Iterable[Any],
    state: Any,
    order: DataOrder | None = None,
    rank_state: Any = None,
) -> TrainingData:
    """Return the data of a trainer that loaded a state, at its position."""
    progress = TrainerProgress(epoch_id=state["epoch_id"], step_id=state["step_id"])
    data = data_of(loader, order, progress)
    data.check(state, rank_state or {})
    data.load_state_dict(state, rank_state or {})
    return data


def same(a: Any, b: Any) -> bool:
    """Return True if two nested batches are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def rng_states() -> list[Any]:
    """Return the states of the global RNGs of torch, NumPy and Python."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return [torch.get_rng_state(), list(keys), rest, random.getstate()]


def epochs(data: TrainingData, count: int = 2) -> list[list[Any]]:
    """Return the batches of some epochs, as a trainer iterates over them."""
    return [list(data.epoch(epoch_id)) for epoch_id in range(count)]


def plain_epochs(loader: DataLoader[Any], count: int = 2) -> list[list[Any]]:
    """Return the batches of some epochs of a plain loop."""
    return [list(loader) for _ in range(count)]
