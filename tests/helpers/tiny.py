"""A tiny training shared by tests: a linear model on random data, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.testing.counting import TracedCall

Batch = tuple[torch.Tensor, torch.Tensor]


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def make_loader(
    batches: int = 7, batch_size: int = 4, rest: int = 0, **options: Any
) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return a loader of ``batches`` full batches and, with ``rest``, a smaller last batch."""
    generator = torch.Generator().manual_seed(1)
    count = batches * batch_size + rest
    data = torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)
    return DataLoader(TensorDataset(*data), batch_size=batch_size, **options)


def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, torch.nn.functional.mse_loss(outputs, targets)


def make_trainer(
    hooks: HookLike | Iterable[HookLike] | None = None,
    *,
    model: torch.nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    **options: Any,
) -> HookBasedTrainer:
    model = make_model() if model is None else model
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model,
        make_loader() if loader is None else loader,
        options.pop("batch_processor", SimpleBatchProcessor.from_callable(loss_of)),
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[] if hooks is None else hooks,
        **options,
    )


def without_checks(calls: list[TracedCall]) -> list[TracedCall]:
    """Leave out the comparisons of gradients and weights between ranks, which every run makes."""
    return [call for call in calls if not call.places[-1].function.startswith("ReplicaCheck.")]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Return True if all tensors are bit-identical."""
    return len(a) == len(b) and all(map(torch.equal, a, b))
