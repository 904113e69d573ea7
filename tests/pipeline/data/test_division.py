"""Several processes get the batches that Accelerate's ``BatchSamplerShard`` gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from loaded_data import Indices
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.data.map_data import MapData
from robo_orchard_lab.pipeline.data.share import Share
from robo_orchard_lab.pipeline.progress import TrainerProgress


class OwnSampler(SequentialSampler):
    """Iterated, since it might give anything."""


class OwnBatches(Sampler[list[int]]):
    """Batches of any size, without a ``batch_size``."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def passed_over(batch_sampler: Any, length: int, share: Share) -> tuple[list[Any], list[Any]]:
    """The batches of an epoch, and the numbers of their samples."""
    loader = DataLoader(Indices(length), batch_sampler=batch_sampler)
    progress = TrainerProgress()
    data = MapData(loader, DataOrder(), Share(1, share.rank), progress)
    data._share = share  # else the processes would have to be there
    steps = data.steps_per_epoch
    batches, numbers = [], []
    for batch in data.epoch(0, 0, 0):
        batches.append(batch.tolist())
        made_of = data.batch_indices()
        assert made_of is not None
        numbers.append(list(made_of.numbers))
        assert next(data.sizes(progress.step_id) or iter([len(batch)])) == len(batch)
        progress.finish_step()
    assert steps == len(batches)
    return batches, numbers


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    processes=st.integers(2, 4),
    own=st.booleans(),
    split=st.booleans(),
    drop_last=st.booleans(),
    even=st.booleans(),
)
def test_the_batches_are_those_of_accelerate(
    length: int,
    batch_size: int,
    processes: int,
    own: bool,
    split: bool,
    drop_last: bool,
    even: bool,
) -> None:
    """Each rank's, whole or split, evened out or not, of torch's sampler or one's own."""
    if split:
        batch_size *= processes
    sampler = (OwnSampler if own else SequentialSampler)(range(length))
    given: dict[int, int] = {}
    for rank in range(processes):
        batches, numbers = passed_over(
            BatchSampler(sampler, batch_size, drop_last),
            length,
            Share(processes, rank, even, split),
        )
        expected = BatchSamplerShard(
            BatchSampler(range(length), batch_size, drop_last), processes, rank, split, even
        )
        assert batches == numbers == list(expected)
        for number in (number for batch in numbers for number in batch):
            given[number] = given.get(number, 0) + 1
    if not drop_last:
        assert sorted(given) == list(range(length))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9), processes=st.integers(2, 3))
def test_batches_of_any_size_are_dealt_out(sizes: list[int], processes: int) -> None:
    """A batch sampler without a batch size: whole batches, the first again where some lack."""
    batches, begin = [], 0
    for size in sizes:
        batches.append(list(range(begin, begin + size)))
        begin += size
    for rank in range(processes):
        found, numbers = passed_over(OwnBatches(batches), begin, Share(processes, rank))
        assert found == numbers == list(BatchSamplerShard(OwnBatches(batches), processes, rank))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 50),
    processes=st.sampled_from([1, 2, 4]),
    step_id=st.integers(0, 6),
)
def test_another_number_of_processes_sees_the_same_order(
    length: int, processes: int, step_id: int
) -> None:
    """Steps of eight samples, by one process or several, and a position in the one's epoch."""

    def loader(batch_size: int) -> DataLoader[Any]:
        return DataLoader(Indices(length), batch_size, sampler=RandomSampler(range(length)))

    progress = TrainerProgress()
    alone = MapData(loader(8), DataOrder(), Share(), progress)
    batches = [batch.tolist() for batch in alone.epoch(1, 0, 0)]
    progress.step_id = min(step_id, len(batches))
    state = alone.state()
    joined: list[list[int]] = [[] for _ in batches[progress.step_id :]]
    for rank in range(processes):
        data = MapData(loader(8 // processes), DataOrder(), Share(), progress)
        data._share = Share(processes, rank, even=False)
        data.check(state, {}, within_epoch=progress.step_id > 0)
        data.load(state, {})
        for step, batch in enumerate(data.epoch(1, 0, progress.step_id)):
            joined[step] += batch.tolist()
    assert joined == batches[progress.step_id :]
