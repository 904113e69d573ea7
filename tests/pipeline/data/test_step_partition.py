"""Several processes split a step's samples evenly and repeat none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from loaded_data import Indices
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.data.loader import BatchShard
from robo_orchard_lab.pipeline.data.map_data import MapData
from robo_orchard_lab.pipeline.progress import TrainerProgress


class OwnSampler(SequentialSampler):
    """Custom sampler, which must be iterated."""


class OwnBatches(Sampler[list[int]]):
    """Batches of any size, without a ``batch_size``."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def iterate_rank(
    loader: DataLoader[Any], shard: BatchShard, seed: int = 0
) -> list[tuple[list[int], float]]:
    """Return this rank's samples and the total number of samples of each step."""
    progress = TrainerProgress()
    data = MapData(loader, DataOrder(), BatchShard(1, shard.rank), progress)
    data._shard = shard  # else the processes would have to be there
    steps = data.steps_per_epoch
    result = []
    batches = data.epoch(seed, 0, 0)
    ahead = data.sizes(0, ahead=True)
    own_sizes = None if shard.processes == 1 else data.sizes(0, ahead=False)
    for batch in batches:
        made_of = data.batch_indices(progress.step_id)
        assert made_of is not None
        loaded = [batch] if isinstance(batch, int) else batch.tolist()
        assert loaded  # a padding batch has samples, too
        own = [] if made_of.is_padding_step else loaded
        job = len(own) if own_sizes is None else next(own_sizes).total
        if made_of.sizes is not None:
            assert made_of.sizes == (len(own), job)
        if ahead is not None:
            assert next(ahead) == (len(own), job)
        result.append((own, job))
        progress.finish_step()
    assert steps == len(result)
    assert ahead is None or next(ahead, None) is None
    return result


def iterate_ranks(loader_of: Any, processes: int, split: bool = False) -> list[list[list[int]]]:
    """Return each rank's samples in each step; checks that ranks agree on the totals."""
    ranks = [
        iterate_rank(loader_of(), BatchShard(processes, rank, split)) for rank in range(processes)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    steps = [list(step) for step in zip(*ranks, strict=True)]
    for step in steps:
        assert {job for _, job in step} == {sum(len(own) for own, _ in step)}
    return [[own for own, _ in step] for step in steps]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    processes=st.integers(2, 4),
    sampler=st.sampled_from([SequentialSampler, OwnSampler, RandomSampler]),
    split=st.booleans(),
    drop_last=st.booleans(),
)
def test_joined_ranks_equal_one_process(
    length: int, batch_size: int, processes: int, sampler: Any, split: bool, drop_last: bool
) -> None:
    """Joined, a step's samples are one process's batch; ranks differ by at most one sample."""
    per_step = batch_size * processes

    def loader(size: int) -> DataLoader[Any]:
        batches = BatchSampler(sampler(range(length)), size, drop_last)
        return DataLoader(Indices(length), batch_sampler=batches)

    alone = [own for own, _ in iterate_rank(loader(per_step), BatchShard())]
    steps = iterate_ranks(lambda: loader(per_step if split else batch_size), processes, split)
    assert [list(chain(*step)) for step in steps] == alone
    for step in steps:
        sizes = [len(own) for own in step]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    processes=st.integers(2, 3),
    split=st.booleans(),
)
def test_custom_batches_are_distributed(sizes: list[int], processes: int, split: bool) -> None:
    """Custom batches go to the ranks in turn, or each is split."""
    batches, begin = [], 0
    for size in sizes:
        batches.append(list(range(begin, begin + size)))
        begin += size
    steps = iterate_ranks(
        lambda: DataLoader(Indices(begin), batch_sampler=OwnBatches(batches)), processes, split
    )
    if split:
        assert [list(chain(*step)) for step in steps] == batches
        assert all(len(step[0]) - len(step[-1]) <= 1 for step in steps)
    else:
        assert [own for step in steps for own in step if own] == batches


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 9), processes=st.integers(2, 4), own=st.booleans())
def test_complete_batches_are_distributed(length: int, processes: int, own: bool) -> None:
    """The ranks take indices in turn if a dataset makes a batch of each index."""
    sampler = (OwnSampler if own else SequentialSampler)(range(length))
    steps = iterate_ranks(
        lambda: DataLoader(Indices(length), batch_size=None, sampler=sampler), processes
    )
    assert [index for step in steps for own in step for index in own] == list(range(length))
    assert all(len(own) == 1 for step in steps[:-1] for own in step)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 50),
    processes=st.sampled_from([1, 2, 4]),
    step_id=st.integers(0, 6),
)
def test_different_world_size_sees_the_same_order(
    length: int, processes: int, step_id: int
) -> None:
    """Steps of eight samples resume at any world size from one process's position."""

    def loader(batch_size: int) -> DataLoader[Any]:
        return DataLoader(Indices(length), batch_size, sampler=RandomSampler(range(length)))

    progress = TrainerProgress()
    alone = MapData(loader(8), DataOrder(), BatchShard(), progress)
    batches = [batch.tolist() for batch in alone.epoch(1, 0, 0)]
    progress.step_id = min(step_id, len(batches))
    state = alone.state()
    joined: list[list[int]] = [[] for _ in batches[progress.step_id :]]
    for rank in range(processes):
        data = MapData(loader(8 // processes), DataOrder(), BatchShard(), progress)
        data._shard = BatchShard(processes, rank)
        data.check(state, {}, within_epoch=progress.step_id > 0)
        data.load(state, {})
        for step, batch in enumerate(data.epoch(1, 0, progress.step_id)):
            made_of = data.batch_indices(progress.step_id + step)
            if made_of is not None and not made_of.is_padding_step:
                joined[step] += batch.tolist()
    assert joined == batches[progress.step_id :]
