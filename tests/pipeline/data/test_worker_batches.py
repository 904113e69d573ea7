"""Batches from workers, loaded before their epoch and sent through shared memory."""

from __future__ import annotations

import gc
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable
from time import sleep
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loaded_data import Drawing, Indices, data_of, epochs, resumed, same
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import DataError
from robo_orchard_lab.pipeline.progress import TrainerProgress


class Counting(Indices):
    """Dataset that counts the samples loaded in all workers."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.loaded = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return index


def persistent(dataset: Dataset[Any], batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    workers = {"num_workers": 1, "persistent_workers": True, **options}
    return DataLoader(dataset, batch_size, **workers)


def test_the_next_epoch_is_loaded_before_it_begins() -> None:
    """Persistent workers load the first batches of the next epoch before it begins."""
    dataset = Counting(40)
    data = data_of(persistent(dataset, shuffle=True))
    list(data.epoch(0))
    while int(dataset.loaded) == 40:  # else this test doesn't end
        sleep(0.01)
    assert same(list(data.epoch(1)), epochs(data_of(DataLoader(dataset, 4, shuffle=True)))[1])


def test_nothing_is_loaded_after_the_last_epoch() -> None:
    """No worker loads samples that the run does not need."""
    dataset = Counting(40)
    data = data_of(persistent(dataset, shuffle=True))
    list(data.epoch(0, last_epoch=1))
    list(data.epoch(1, last_epoch=1))
    assert int(dataset.loaded) == 80


@pytest.mark.parametrize("length", [3, 4, 26, 120])
def test_epochs_of_any_length_equal_those_without_workers(length: int) -> None:
    """Epochs shorter than the prefetched batches are exact, and so are long ones."""
    alone = epochs(data_of(DataLoader(Drawing(length), 4, shuffle=True)), 6)
    assert same(epochs(data_of(persistent(Drawing(length), shuffle=True)), 6), alone)


def shrink(loader: DataLoader[Any]) -> None:
    loader.dataset.length = 17  # type: ignore[attr-defined]  # of Indices


def reweight(loader: DataLoader[Any]) -> None:
    loader.sampler.weights[:20] = 0  # type: ignore[attr-defined]  # of WeightedRandomSampler


def reselect(loader: DataLoader[Any]) -> None:
    loader.sampler.indices = range(5, 25)  # type: ignore[attr-defined]  # of SubsetRandomSampler


def resize(loader: DataLoader[Any]) -> None:
    loader.batch_sampler.batch_size = 5  # type: ignore[union-attr]  # of BatchSampler


CHANGES: dict[str, tuple[Callable[[Dataset[Any]], Any], Callable[[DataLoader[Any]], None]]] = {
    "length": (SequentialSampler, shrink),  # type: ignore[dict-item]
    "weights": (lambda _: WeightedRandomSampler([1.0] * 40, 40), reweight),
    "indices": (lambda _: SubsetRandomSampler(range(30)), reselect),
    "batch size": (RandomSampler, resize),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_epochs_take_effect(change: str) -> None:
    """Batches loaded ahead are dropped if a hook changes the order or the batch size."""
    make, apply = CHANGES[change]

    def third_of(options: dict[str, Any]) -> list[Any]:
        dataset = Indices(40)
        loader = DataLoader(dataset, 4, sampler=make(dataset), **options)
        data = data_of(loader)
        epochs(data)
        apply(loader)
        return list(data.epoch(2))

    alone = third_of({})
    assert same(third_of({"num_workers": 1, "persistent_workers": True}), alone)


def test_state_at_the_end_of_an_epoch_does_not_include_batches_loaded_ahead() -> None:
    """A run stopped after an epoch resumes with the first batch of the next one."""
    progress = TrainerProgress()
    data = data_of(persistent(Drawing(), shuffle=True), progress=progress)
    list(data.epoch(0))
    progress.finish_epoch()
    state = data.state_dict()
    again = resumed(DataLoader(Drawing(), 4, shuffle=True), state)
    assert same(list(again.epoch(1)), list(data.epoch(1)))


def test_a_position_can_be_loaded_again_between_epochs() -> None:
    """A rollback to the last epoch drops the batches of the next one."""
    progress = TrainerProgress()
    data = data_of(persistent(Drawing(), shuffle=True), progress=progress)
    state = data.state_dict()
    first, second = epochs(data)
    data.load_state_dict(state, {})
    assert same(epochs(data), [first, second])


def test_workers_end_with_their_data() -> None:
    """Workers end at once when the data is deleted, without a garbage collection."""
    before = set(multiprocessing.active_children())
    data = data_of(persistent(Drawing(), shuffle=True))
    list(data.epoch(0))
    gc.disable()
    try:
        del data
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


def collate(indices: list[int]) -> Any:
    """Return a batch of tensors of all kinds, of sizes that depend on the first index."""
    first = indices[0]
    base = torch.arange(12).reshape(3, 4) + first
    return OrderedDict(
        pair=Pair(base.float(), [base.bfloat16(), {"flags": base > first}, "text", None]),
        scalar=torch.tensor(first),
        empty=torch.empty(0, 3),
        halves=(base.double() / 3, base.to(torch.complex64)),
        transposed=base.T,
        byte=torch.full((1,), first % 200, dtype=torch.uint8),
        longs=torch.arange(first * 37),
        large=torch.arange(200_000) + first if first % 10 == 0 else None,
        parameter=torch.nn.Parameter(torch.ones(2) * first, requires_grad=False),
    )


def test_tensors_of_all_kinds_arrive_unchanged() -> None:
    """Values, types, strides and containers are those of loading without workers, also later."""
    options: dict[str, Any] = {"shuffle": True, "collate_fn": collate}
    alone = epochs(data_of(DataLoader(Indices(150), 2, **options)))
    kept = epochs(data_of(persistent(Indices(150), 2, num_workers=2, **options)))
    for batches, expected in zip(kept, alone, strict=True):
        for batch, other in zip(batches, expected, strict=True):
            assert same(batch, other)
            assert type(batch) is OrderedDict
            assert type(batch["pair"]) is Pair
            assert type(batch["parameter"]) is torch.nn.Parameter
            assert batch["transposed"].stride() == (1, 4)


def test_a_batch_may_be_changed_in_place() -> None:
    """A change of a batch does not reach other batches."""
    data = data_of(persistent(Drawing(80)))
    for batch in data.epoch(0):
        batch[1].zero_()
    assert same(list(data.epoch(1)), epochs(data_of(DataLoader(Drawing(80), 4)))[1])


class Failing(Counting):
    """Dataset that fails to load a sample, once or always."""

    def __init__(self, once: bool) -> None:
        super().__init__(400)
        self.once = once
        self.failures = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> int:
        if index == 233 and not (self.once and self.failures):
            self.failures += 1
            raise KeyError("no such file")
        return super().__getitem__(index)


def batches_until(data: TrainingData, error: type[Exception]) -> tuple[int, str]:
    """Return the number of batches before an error, and the error's text."""
    batches: list[Any] = []
    with pytest.raises(error) as caught:
        batches.extend(data.epoch(0))
    return len(batches), "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_an_error_in_a_group_of_batches_has_its_type_and_place() -> None:
    """All earlier batches are yielded, and the error is the dataset's."""
    batches, text = batches_until(data_of(persistent(Failing(once=False))), KeyError)
    assert batches == 58
    assert "while loading batch 59 of epoch 1" in text


def test_an_error_that_occurs_once_is_reported() -> None:
    """A sample that can be loaded when the group is repeated does not hide its error."""
    dataset = Failing(once=True)
    batches, text = batches_until(data_of(persistent(dataset)), DataError)
    assert batches == 58
    assert "failed to load a batch once" in text
    assert "no such file" in text
