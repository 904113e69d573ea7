"""Generators of a data loader's samplers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from robo_orchard_lab.pipeline.data.random_generators import loader_generators
from tiny import equal, make_loader, make_model, make_trainer, weights


def sampled_in_batches(seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return a loader shuffled by a sampler with its own generator, in a batch sampler."""
    data = make_loader(5).dataset
    assert isinstance(data, TensorDataset)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, batch_size=4, drop_last=False))


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        ([1, 2], set()),
        (make_loader(shuffle=True), set()),
        (make_loader(shuffle=True, generator=torch.Generator()), {"loader.generator"}),
        (sampled_in_batches(0), {"batch_sampler.sampler.generator"}),
    ],
    ids=["list", "none", "loader", "batch_sampler"],
)
def test_generators_are_found(loader: object, found: set[str]) -> None:
    """Generators of the loader, sampler, batch sampler and nested sampler are found."""
    assert set(loader_generators(loader)) == found


def test_resume_restores_a_custom_batch_sampler(tmp_path: Path) -> None:
    """A resumed run continues the order of the sampler within a custom batch sampler."""
    torch.manual_seed(0)
    uninterrupted = make_trainer(loader=sampled_in_batches(3), max_step=8)
    uninterrupted()
    torch.manual_seed(0)
    first = make_trainer(loader=sampled_in_batches(3), max_step=3)
    first()
    first.save_checkpoint(tmp_path / "saved")
    resumed = make_trainer(
        model=make_model(),
        loader=sampled_in_batches(4),
        max_step=8,
        resume_from=tmp_path / "saved",
    )
    resumed()
    assert equal(weights(resumed.model), weights(uninterrupted.model))
