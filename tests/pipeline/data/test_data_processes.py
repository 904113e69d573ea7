"""Training data in real processes under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from data_on_ranks import LOADERS
from launching import SCRIPTS, launch
from loaded_data import Drawing, Indices, data_of
from robo_orchard_lab.pipeline.data import DataOrder

SCRIPT = SCRIPTS / "data_on_ranks.py"


def run(folder: Path, processes: int) -> list[dict[str, Any]]:
    """Return the results of each rank."""
    launch(SCRIPT, folder, processes=processes)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("loader", ["sequential", "generator", "drop_last"])
@pytest.mark.parametrize("kind", ["per_rank", "split"])
def test_joined_steps_equal_one_process(
    kind: str, loader: str, ranks: list[dict[str, Any]]
) -> None:
    """A plain and a prepared loader yield each sample once, in both epochs."""
    one = LOADERS[loader]()
    batches: Any = one.batch_sampler
    size = 8 if kind == "per_rank" else 4
    plain = DataLoader(
        one.dataset,
        batch_sampler=BatchSampler(batches.sampler, size, batches.drop_last),
        generator=one.generator,
    )
    expected = [[batch.tolist() for batch in plain] for _ in range(2)]
    for ours in (1, 2):
        joined = [
            [a + b for a, b in zip(*epoch, strict=True)]
            for epoch in zip(*(rank[f"{kind} {loader}"][ours] for rank in ranks), strict=True)
        ]
        assert joined == expected


@pytest.mark.parametrize("kind", ["per_rank", "split"])
def test_order_depends_on_the_seed(kind: str, ranks: list[dict[str, Any]]) -> None:
    """The order equals one process, also if Accelerate gave the sampler a generator."""
    size = 8 if kind == "per_rank" else 4
    alone = data_of(DataLoader(Indices(27), size, shuffle=True), DataOrder(seed=7))
    expected = [[batch.tolist() for batch in alone.epoch(epoch_id)] for epoch_id in range(2)]
    for ours in (1, 2):
        epochs = zip(*(rank[f"{kind} shuffled"][ours] for rank in ranks), strict=True)
        assert [[a + b for a, b in zip(*epoch, strict=True)] for epoch in epochs] == expected


@pytest.mark.parametrize("kind", ["per_rank", "split"])
def test_stream_batches_equal_accelerates(kind: str, ranks: list[dict[str, Any]]) -> None:
    """A plain and a prepared loader yield Accelerate's batches with dispatch_batches."""
    for rank in ranks:
        theirs, ours, of_prepared = rank[f"{kind} stream"]
        assert theirs == ours == of_prepared
    assert ranks[0][f"{kind} stream"] != ranks[1][f"{kind} stream"]


@pytest.mark.parametrize("loader", ["sequential", "generator", "drop_last", "stream"])
def test_two_processes_resume_within_an_epoch(loader: str, ranks: list[dict[str, Any]]) -> None:
    """Map-style data seeks; a dispatched stream is fast-forwarded."""
    for rank in ranks:
        rest, again = rank[f"resumed {loader}"]
        assert rest == again
        assert len(rest) >= 2


def test_ranks_use_the_first_ranks_order(ranks: list[dict[str, Any]]) -> None:
    """Seed and generators of the first rank apply to all; each sample is loaded once."""
    assert ranks[0]["unseeded"] == ranks[1]["unseeded"] == 0
    given = [index for rank in ranks for batch in rank["own"] for index in batch]
    assert sorted(given) == list(range(32))


def test_augmentation_by_sample_equals_one_process(
    ranks: list[dict[str, Any]],
) -> None:
    """Keyed by sample, augmentation equals one process; by batch, it differs by rank."""
    alone = data_of(DataLoader(Drawing(32), 8, shuffle=True), DataOrder(7, "sample"))
    drawn_for = {
        int(index): row
        for indices, drawn in alone.epoch(0)
        for index, row in zip(indices, drawn, strict=True)
    }
    for rank in ranks:
        for row in torch.cat(rank["by sample"]):
            assert torch.equal(row[1:], drawn_for[int(row[0])])
    drawn = [batch[0, 1].item() for rank in ranks for batch in rank["by batch"]]
    assert len(set(drawn)) == len(drawn) == 8


def test_distributed_sampler_is_refused(ranks: list[dict[str, Any]]) -> None:
    """The error names the remedy."""
    for rank in ranks:
        assert "is a DistributedSampler, which divides the samples among 2" in rank["refused"]
        assert "leave it out" in rank["refused"]
