"""Datasets, transforms and options of users' loaders stay exact."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    default_collate,
    get_worker_info,
)

from loaded_data import Drawing, Indices, data_of, epochs, resumed, same
from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.progress import TrainerProgress

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")


Transform = Callable[[torch.Tensor], torch.Tensor]


class Compose:
    """Transforms in a list, as in torchvision."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            value = transform(value)
        return value


class Noise:
    """Transform that holds a generator."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            return value + torch.rand((), generator=self.generator).double()
        return value + float(self.generator.uniform(0, 1))


class Transformed(Dataset[torch.Tensor]):
    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(torch.tensor(float(index), dtype=torch.float64))


GENERATORS: dict[str, Any] = {
    "numpy": lambda: np.random.default_rng(1),
    "philox": lambda: np.random.Generator(np.random.Philox(1)),
    "legacy numpy": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
    "torch": lambda: torch.Generator().manual_seed(1),
}


GLOBAL = np.random.default_rng(1)


def add_global(value: torch.Tensor) -> torch.Tensor:
    return value + GLOBAL.random()


def calls_another(value: torch.Tensor) -> torch.Tensor:
    return add_global(value)


def add_from(generator: Any, value: torch.Tensor) -> torch.Tensor:
    return value + float(generator.random())


def add_from_default(value: torch.Tensor, generator: Any = GLOBAL) -> torch.Tensor:
    return value + float(generator.random())


def closure() -> Transform:
    generator = np.random.default_rng(1)
    return lambda value: value + generator.random()


class Slotted:
    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = random.Random(1)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.generator.random()


class UsesGlobal(Transformed):
    def __init__(self) -> None:
        """Hold nothing."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index), dtype=torch.float64) + GLOBAL.random()


class OfClass(UsesGlobal):
    generator = random.Random(1)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index), dtype=torch.float64) + self.generator.random()


LOCATIONS: dict[str, Callable[[], Dataset[torch.Tensor]]] = {
    "a partial": lambda: Transformed(partial(add_from, np.random.default_rng(1))),
    "a keyword of a partial": lambda: Transformed(
        partial(add_from_default, generator=random.Random(1))
    ),
    "a closure": lambda: Transformed(closure()),
    "a global of a function": lambda: Transformed(add_global),
    "a global of a function that is called": lambda: Transformed(calls_another),
    "a default of a function": lambda: Transformed(add_from_default),
    "a slot": lambda: Transformed(Slotted()),
    "a global of the dataset's method": UsesGlobal,
    "an attribute of the dataset's class": OfClass,
}


def noisy(kind: str, **options: Any) -> DataLoader[Any]:
    data = Transformed(Compose(Noise(GENERATORS[kind]())))
    return DataLoader(Subset(data, range(26)), 4, shuffle=True, **options)


def check_exact(make: Any, **workers: Any) -> None:
    """Check that workers change nothing and that a run resumes within its second epoch."""
    order = DataOrder(seed=7)
    progress = TrainerProgress()
    data = data_of(make(), order, progress)
    list(data.epoch(0))
    progress.finish_epoch()
    batches, state = [], None
    for batch in data.epoch(1):
        batches.append(batch)
        progress.finish_step()
        if progress.step_id == 3:
            state = data.state_dict()
    for options in ({}, {"num_workers": 2, **workers}):
        again = resumed(make(**options), state, order)
        assert same(list(again.epoch(1, 3)), batches[3:])
    assert same(epochs(data_of(make(num_workers=2, **workers), order))[1], batches)


@pytest.mark.parametrize("kind", GENERATORS)
def test_dataset_generators_are_seeded(kind: str) -> None:
    """Generators in transforms are seeded; each batch draws different numbers."""
    check_exact(lambda **options: noisy(kind, **options), persistent_workers=True)
    drawn = torch.cat(epochs(data_of(noisy(kind)), 1)[0]) % 1
    assert len(drawn.unique()) == 26


@pytest.mark.parametrize("location", LOCATIONS)
def test_generators_are_found(location: str) -> None:
    """A generator is seeded wherever a dataset holds it, such as in a closure or a global."""
    check_exact(lambda **options: DataLoader(LOCATIONS[location](), 4, shuffle=True, **options))


def test_dataset_generators_keep_their_state() -> None:
    """A generator in this process continues as if nothing had been loaded."""
    loader = noisy("numpy")
    dataset: Any = loader.dataset
    kept = dataset.dataset.transform.transforms[0].generator
    list(data_of(loader).epoch(0))
    assert kept.random() == np.random.default_rng(1).random()


def replace_generator(worker_id: int) -> None:
    info: Any = get_worker_info()
    assert type(info.dataset) is Transformed
    info.dataset.transform = Noise(np.random.default_rng(info.seed))


def test_generators_set_by_worker_init_fn_are_seeded() -> None:
    """A worker_init_fn sees the user's dataset, and generators it sets are seeded."""

    def make(**options: Any) -> DataLoader[Any]:
        data = Transformed(Noise(np.random.default_rng(0)))
        return DataLoader(data, 4, worker_init_fn=replace_generator, **options)

    check_exact(make)


def seed_worker(worker_id: int) -> None:
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_options_are_kept(context: str) -> None:
    """Start method, timeout and a seeding worker_init_fn do not change the batches."""

    def make(**options: Any) -> DataLoader[Any]:
        if options:
            options.update(multiprocessing_context=context, timeout=60, worker_init_fn=seed_worker)
        return DataLoader(Drawing(), 4, shuffle=True, **options)

    alone = epochs(data_of(make()), 1)
    assert same(epochs(data_of(make(num_workers=1)), 1), alone)


def noisy_collate(samples: list[Any]) -> torch.Tensor:
    return torch.stack([sample[1] for sample in samples]) * random.random() + np.random.rand()


@pytest.mark.parametrize("keyed_by", ["batch", "sample"])
def test_collate_fn_may_draw(keyed_by: Any) -> None:
    """Its random numbers are keyed by batch, also if the samples' are keyed by sample."""

    def make(**options: Any) -> DataLoader[Any]:
        return DataLoader(Drawing(), 4, shuffle=True, collate_fn=noisy_collate, **options)

    order = DataOrder(7, keyed_by)
    alone = epochs(data_of(make(), order))
    assert same(epochs(data_of(make(num_workers=2), order)), alone)
    check_exact(make)


class SeedsEachSample(Drawing):
    """Dataset that derives a generator for each sample from torch's initial seed."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = np.random.default_rng([torch.initial_seed(), index])
        return torch.tensor(index), torch.tensor(draw.random())


def test_initial_seed_belongs_to_the_batch() -> None:
    """torch.initial_seed() is the batch's seed, in workers and without."""
    check_exact(lambda **options: DataLoader(SeedsEachSample(), 4, shuffle=True, **options))
    torch.manual_seed(1)
    first = epochs(data_of(DataLoader(SeedsEachSample(), 4)))
    torch.manual_seed(2)
    assert same(epochs(data_of(DataLoader(SeedsEachSample(), 4))), first)
    assert torch.initial_seed() == 2


class ByBatch(Drawing):
    """Dataset that loads the samples of a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = torch.rand(())
        return [(torch.tensor(index), noise) for index in indices]


def test_getitems_is_called() -> None:
    """``__getitems__`` is called if keyed by batch; else each item is read."""
    check_exact(lambda **options: DataLoader(ByBatch(), 4, shuffle=True, **options))
    (batch, *_) = data_of(DataLoader(ByBatch(), 4)).epoch(0)
    assert len(batch[1].unique()) == 1
    (batch, *_) = data_of(DataLoader(ByBatch(), 4), DataOrder(7, "sample")).epoch(0)
    assert batch[1].shape == (4, 4)


class Failing(Indices):
    def __getitem__(self, index: int) -> int:
        if index == 9:
            raise KeyError("no such file")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_error_names_the_batch(workers: int) -> None:
    """The note has the indices of the samples; earlier batches are yielded."""
    batches = data_of(DataLoader(Failing(20), 4, num_workers=workers)).epoch(1)
    assert [len(next(batches)) for _ in range(2)] == [4, 4]
    with pytest.raises(KeyError, match="no such file") as caught:
        next(batches)
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "while loading batch 3 of epoch 2, of the dataset's indices [8, 9, 10, 11]" in text


class Growing(Indices):
    """Dataset that has more samples in each epoch."""

    def __init__(self) -> None:
        super().__init__(8)

    def set_epoch(self, epoch: int) -> None:
        self.length = 8 + 4 * epoch

    def __getitem__(self, index: int) -> int:
        return index + 1000 * self.length


@pytest.mark.parametrize("persistent", [False, True])
def test_dataset_may_change_with_set_epoch(persistent: bool) -> None:
    """set_epoch is called in persistent workers and on a resume as well."""
    progress = TrainerProgress(epoch_id=2, step_id=3)
    data = data_of(DataLoader(Growing(), 4, shuffle=True), progress=progress)
    batches = list(data.epoch(2))
    assert len(batches) == data.steps_per_epoch == 4
    assert int(batches[0][0]) // 1000 == 16
    again = resumed(DataLoader(Growing(), 4, shuffle=True), data.state_dict())
    assert same(list(again.epoch(2, 3)), batches[3:])
    options: Any = {"num_workers": 1, "persistent_workers": True} if persistent else {}
    assert same(epochs(data_of(DataLoader(Growing(), 4, shuffle=True, **options)), 3)[2], batches)


def test_dataset_length_may_change_between_epochs() -> None:
    """Each epoch has the dataset's length at its start."""
    dataset = Indices(8)
    data = data_of(DataLoader(dataset, 4, shuffle=True))
    assert len(list(data.epoch(0))) == len(data) == 2
    dataset.length = 20
    assert len(list(data.epoch(1))) == 5


def test_set_epoch_of_samplers_is_called() -> None:
    """A DistributedSampler of one process shuffles by epoch."""

    def loader() -> DataLoader[Any]:
        sampler: Any = DistributedSampler(Indices(26), num_replicas=1, rank=0)
        return DataLoader(Indices(26), 4, sampler=sampler)

    theirs: Any = loader()
    theirs.sampler.set_epoch(2)
    assert same(list(data_of(loader()).epoch(2)), list(theirs))


class Forever(Sampler[int]):
    """Infinite sampler without a length."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(26, ()))


class ForeverStream(IterableDataset[Any]):
    """Infinite stream, sharded by worker."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        index = 0 if info is None else info.id
        while True:
            yield index, np.random.rand()
            index += 1 if info is None else info.num_workers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_infinite_data_resumes(kind: str, workers: int) -> None:
    """An epoch has no end, and a run resumes within it."""

    def loader() -> DataLoader[Any]:
        if kind == "stream":
            return DataLoader(ForeverStream(), 4, num_workers=workers)
        return DataLoader(Drawing(), 4, sampler=Forever(), num_workers=workers)

    progress = TrainerProgress()
    order = DataOrder(seed=7, fast_forward=True)
    data = data_of(loader(), order, progress)
    given = data.epoch(0)
    batches = []
    for _ in range(9):
        batches.append(next(given))
        progress.finish_step()
        if progress.step_id == 5:
            state, rank_state = data.state_dict(), data.rank_state_dict()
    assert data.steps_per_epoch is None
    with pytest.raises(TypeError, match="the training data has no length"):
        len(data)
    again = resumed(loader(), state, order, rank_state).epoch(0, 5)
    assert same([next(again) for _ in range(4)], batches[5:])


def test_batches_are_yielded_in_order(caplog: pytest.LogCaptureFixture) -> None:
    """in_order=False is ignored with a warning, since it can't be reproduced."""
    loader = DataLoader(Drawing(), 4, num_workers=2, in_order=False)
    assert same(epochs(data_of(loader)), epochs(data_of(DataLoader(Drawing(), 4))))
    assert caplog.text.count("in_order=False") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_pin_memory_changes_nothing(workers: int) -> None:
    """Memory is pinned only if there is a device."""
    loader = DataLoader(Drawing(), 4, shuffle=True, pin_memory=True, num_workers=workers)
    assert same(epochs(data_of(loader)), epochs(data_of(DataLoader(Drawing(), 4, shuffle=True))))


def test_seedable_sampler_of_accelerate_is_used() -> None:
    """The order equals Accelerate's loader and can be resumed with a data_seed."""
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5)
    accelerator = Accelerator(cpu=True, dataloader_config=config)

    def loader() -> DataLoader[Any]:
        return DataLoader(Indices(26), 4, shuffle=True)

    theirs = accelerator.prepare(loader())
    expected = [list(theirs) for _ in range(2)]
    data = TrainingData(loader(), DataOrder(), accelerator, TrainerProgress())
    assert same(epochs(data), expected)
    data = TrainingData(loader(), DataOrder(), accelerator, TrainerProgress())
    assert same(list(data.epoch(1, 3)), expected[1][3:])


def test_skip_first_batches_is_refused() -> None:
    """It would skip batches in every epoch; a resumed run seeks its position."""
    prepared = Accelerator(cpu=True).prepare(DataLoader(Indices(26), 4))
    with pytest.raises(PipelineConfigError, match=r"accelerate\.skip_first_batches, which skips"):
        data_of(skip_first_batches(prepared, 2))


def test_empty_dataset_yields_no_batch() -> None:
    """The trainer refuses it."""
    data = data_of(DataLoader(Indices(0), 4))
    assert (list(data.epoch(0)), len(data)) == ([], 0)


def test_subsets_in_memory_are_loaded_without_seeding() -> None:
    """Joined and cut lists and tensors equal a plain loop."""
    rest: Any = [4, 5, 6]
    joined: Any = ConcatDataset([rest, Subset(rest, [0, 2])])
    assert same(epochs(data_of(DataLoader(joined, 2)), 1), [list(DataLoader(joined, 2))])
    assert default_collate([1, 2]).tolist() == [1, 2]
