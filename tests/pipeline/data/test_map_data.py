"""Batches of a map-style dataset equal a plain loop and resume at any step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from loaded_data import (
    Drawing,
    Indices,
    data_of,
    epochs,
    local_sizes,
    plain_epochs,
    resumed,
    rng_states,
    same,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.progress import TrainerProgress


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shuffled(Sampler[int]):
    """Custom sampler that draws from its generator or from torch's global RNG."""

    def __init__(self, length: int, generator: torch.Generator | None = None) -> None:
        self.length = length
        self.generator = generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            yield int(torch.randint(self.length, (), generator=self.generator))


class Buckets(Sampler[list[int]]):
    """Custom batch sampler: batches of one, two, three samples and so on, shuffled."""

    def __init__(self, length: int, generator: Any = None) -> None:
        self.length = length
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        draw = self.generator or np.random
        first = 0
        for size in range(1, self.length):
            batch = list(range(first, min(first + size, self.length)))
            if not batch:
                return
            draw.normal()  # an odd number of gaussians
            yield [int(index) for index in draw.permutation(batch)] if size > 1 else batch
            first += size


Samplers = dict[str, Callable[[int, torch.Generator | None], Sampler[int] | list[int]]]
SAMPLERS: Samplers = {
    "sequential": lambda n, g: SequentialSampler(range(n)),
    "random": lambda n, g: RandomSampler(range(n), generator=g),
    "fewer": lambda n, g: RandomSampler(range(n), num_samples=max(1, n // 2), generator=g),
    "more": lambda n, g: RandomSampler(range(n), num_samples=2 * n + 3, generator=g),
    "replacement": lambda n, g: RandomSampler(range(n), True, n + 40, generator=g),
    "weighted": lambda n, g: WeightedRandomSampler(range(1, n + 1), n + 5, generator=g),
    "subset": lambda n, g: SubsetRandomSampler(range(n - 1, n // 3, -1) if n > 1 else [0], g),
    "list": lambda n, g: [*range(0, n, 2), *range(n)],
    "custom": Shuffled,
}


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    length=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    shared=st.booleans(),
)
def test_sampler_with_generator_equals_a_plain_loop(
    sampler: str, length: int, batch_size: int, drop_last: bool, shared: bool
) -> None:
    """Three epochs equal a plain loop, also if the loader shares the generator."""

    def loader() -> DataLoader[int]:
        drawn = generator()
        return DataLoader(
            Indices(length),
            batch_size,
            sampler=SAMPLERS[sampler](length, drawn),
            drop_last=drop_last,
            generator=drawn if shared else None,
        )

    data = data_of(loader())
    assert same(epochs(data, 3), plain_epochs(loader(), 3))
    assert data.steps_per_epoch == len(loader())


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    length=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    own=st.booleans(),
    keyed_by=st.sampled_from(["batch", "sample"]),
)
def test_seeking_equals_iterating(
    sampler: str, length: int, batch_size: int, drop_last: bool, own: bool, keyed_by: Any
) -> None:
    """A run resumed from any step of the second epoch loads the same batches."""
    order = DataOrder(seed=5, keyed_by=keyed_by)

    def loader() -> DataLoader[Any]:
        drawn = SAMPLERS[sampler](length, generator() if own else None)
        return DataLoader(Drawing(length), batch_size, sampler=drawn, drop_last=drop_last)

    progress = TrainerProgress()
    data = data_of(loader(), order, progress)
    list(data.epoch(0))
    progress.finish_epoch()
    states, batches, sizes = [data.state_dict()], [], []
    for batch in data.epoch(1):
        batches.append(batch)
        sizes.append(len(batch[0]))
        assert data.sample_indices == batch[0].tolist()
        progress.finish_step()
        states.append(data.state_dict())
    for step_id, state in enumerate(states):
        again = resumed(loader(), state, order)
        assert same(list(again.epoch(1, step_id)), batches[step_id:])
        assert local_sizes(again, step_id) == sizes[step_id:]
        assert again.steps_per_epoch == len(batches)


def loaders_that_draw(workers: int, **options: Any) -> dict[str, DataLoader[Any]]:
    data = Drawing()
    options["num_workers"] = workers
    return {
        "shuffle": DataLoader(data, 4, shuffle=True, **options),
        "generator": DataLoader(data, 4, shuffle=True, generator=generator(), **options),
        "drop_last": DataLoader(data, 4, shuffle=True, drop_last=True, **options),
        "subset": DataLoader(Subset(data, range(5, 25)), 4, shuffle=True, **options),
        "custom": DataLoader(data, 4, sampler=Shuffled(26), **options),
        "buckets": DataLoader(data, batch_sampler=Buckets(26), **options),
        "complete batches": DataLoader(
            Subset(data, range(26)), batch_size=None, shuffle=True, **options
        ),
    }


@pytest.mark.parametrize("keyed_by", ["batch", "sample"])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["shuffle", "generator", "subset", "custom", "buckets"])
def test_workers_change_nothing(kind: str, persistent: bool, keyed_by: Any) -> None:
    """Random numbers while loading are equal with and without workers, persistent or not."""
    order = DataOrder(seed=7, keyed_by=keyed_by)
    alone = epochs(data_of(loaders_that_draw(0)[kind], order))
    loader = loaders_that_draw(2, persistent_workers=persistent, prefetch_factor=3)[kind]
    assert same(epochs(data_of(loader, order)), alone)
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", sorted(loaders_that_draw(0)))
def test_resumed_run_equals_an_uninterrupted_run(kind: str, workers: int) -> None:
    """After three batches of the second epoch, the rest and the next epoch are equal."""
    progress = TrainerProgress()
    data = data_of(loaders_that_draw(workers)[kind], progress=progress)
    list(data.epoch(0))
    progress.finish_epoch()
    batches = []
    state = None
    for batch in data.epoch(1):
        batches.append(batch)
        progress.finish_step()
        if progress.step_id == 3:
            state = data.state_dict()
    progress.finish_epoch()
    third = list(data.epoch(2))
    again = resumed(loaders_that_draw(2 - workers)[kind], state)
    assert same(list(again.epoch(1, 3)), batches[3:])
    assert same(list(again.epoch(2)), third)


def test_persistent_workers_serve_the_next_epoch() -> None:
    """After an epoch that was left early, the same workers load a complete one."""

    def loader() -> DataLoader[Any]:
        return DataLoader(Drawing(), 4, num_workers=1, persistent_workers=True, shuffle=True)

    data = data_of(loader())
    next(data.epoch(0))
    assert same(list(data.epoch(1)), epochs(data_of(loader()))[1])


@pytest.mark.parametrize("seed", [3, None])
def test_order_depends_on_seed_and_epoch(seed: int | None) -> None:
    """Without a generator, an epoch is independent of what happened before."""

    def loader() -> DataLoader[Any]:
        return DataLoader(Drawing(), 4, shuffle=True)

    torch.manual_seed(3)
    first = data_of(loader(), DataOrder(seed))
    batches = epochs(first, 3)
    torch.rand(5)
    torch.manual_seed(3)
    assert same(list(data_of(loader(), DataOrder(seed)).epoch(2)), batches[2])
    torch.manual_seed(4)
    other = list(data_of(loader(), DataOrder(seed)).epoch(2))
    assert same(other, batches[2]) is (seed is not None)


def test_run_without_seed_uses_the_saved_seed() -> None:
    """The saved order continues with seed=None for any seed of torch."""

    def loader() -> DataLoader[Any]:
        return DataLoader(Drawing(), 4, shuffle=True)

    torch.manual_seed(3)
    first = data_of(loader(), DataOrder())
    torch.manual_seed(4)
    second = resumed(loader(), first.state_dict(), DataOrder())
    assert first.seed == second.seed == 3
    assert same(epochs(second), epochs(first))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("odd", [0, 1])
def test_loading_leaves_the_processs_rngs_unchanged(workers: int, odd: int) -> None:
    """The RNGs of torch, NumPy and Python keep their states, cached gaussians included."""
    loaders = loaders_that_draw(workers)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    np.random.randn(odd)
    before = rng_states()
    drawn = []
    for kind in loaders if workers == 0 else ["shuffle", "custom"]:
        for _ in data_of(loaders[kind]).epoch(0):
            assert same(rng_states(), before)
            drawn.append((np.random.randn(), random.gauss(), torch.randn(()).item()))
            before = rng_states()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    np.random.randn(odd)
    assert drawn == [(np.random.randn(), random.gauss(), torch.randn(()).item()) for _ in drawn]


class KeepsRandom(Sampler[int]):
    """Sampler that holds a generator of NumPy or Python."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        indices = list(range(20))
        self.draw.shuffle(indices)
        return iter(indices)


@pytest.mark.parametrize(
    "make", [random.Random, np.random.default_rng, np.random.RandomState], ids=lambda f: f.__name__
)
def test_sampler_generators_are_part_of_the_state(make: Any) -> None:
    """A sampler with a generator of NumPy or Python resumes at its position."""

    def loader(seed: int) -> DataLoader[Any]:
        return DataLoader(Indices(20), 4, sampler=KeepsRandom(make(seed)))

    progress = TrainerProgress()
    data = data_of(loader(1), progress=progress)
    first = list(data.epoch(0))
    progress.finish_epoch()
    between = data.state_dict()
    second = list(data.epoch(1))
    progress.finish_step()
    assert same(list(resumed(loader(2), data.state_dict()).epoch(1, 1)), second[1:])
    assert same(list(resumed(loader(2), between).epoch(1)), second)
    assert same(first, list(loader(1)))


class Keeps(Sampler[Any]):
    """Sampler whose next epoch depends on an attribute it changed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.indices = list(range(20))
        self.array = np.arange(20)
        self.tensor = torch.arange(20)
        self.batches = [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9], [10, 11, 12, 13, 14], [15, 16]]

    def __len__(self) -> int:
        return 5 if self.kind == "batches" else 20

    def __iter__(self) -> Iterator[Any]:
        if self.kind == "count":
            self.count += 1
            order = torch.randperm(20, generator=torch.Generator().manual_seed(self.count))
            return iter(order.tolist())
        if self.kind == "indices":
            random.shuffle(self.indices)
        elif self.kind == "array":
            np.random.shuffle(self.array)
        elif self.kind == "tensor":
            self.tensor = self.tensor[torch.randperm(20)]
        else:
            random.shuffle(self.batches)
        kept = getattr(self, self.kind)
        return iter(kept if isinstance(kept, list) else kept.tolist())


@pytest.mark.parametrize("kind", ["count", "indices", "array", "tensor", "batches"])
def test_sampler_attributes_are_part_of_the_state(kind: str) -> None:
    """An epoch counter or a shuffled order resumes at its saved value."""

    def loader() -> DataLoader[Any]:
        if kind == "batches":
            return DataLoader(Indices(20), batch_sampler=Keeps(kind))
        return DataLoader(Indices(20), 4, sampler=Keeps(kind))

    order, progress = DataOrder(seed=7), TrainerProgress()
    data = data_of(loader(), order, progress)
    list(data.epoch(0))
    progress.finish_epoch()
    between = data.state_dict()
    second = list(data.epoch(1))
    progress.finish_step()
    assert same(list(resumed(loader(), data.state_dict(), order).epoch(1, 1)), second[1:])
    assert same(list(resumed(loader(), between, order).epoch(1)), second)
    again = resumed(loader(), data.state_dict(), order)
    list(again.epoch(1, 1))
    assert same(list(again.epoch(2)), list(data.epoch(2)))


def test_sampler_configuration_may_change() -> None:
    """Attributes that never changed are configuration, not state."""
    state = data_of(DataLoader(Indices(20), 4, sampler=Keeps("count"))).state_dict()
    sampler = Keeps("count")
    sampler.indices = [3]
    resumed(DataLoader(Indices(20), 4, sampler=sampler), state)
    assert sampler.indices == [3]


def test_tensor_dataset_is_loaded_without_seeding() -> None:
    """Tensors in memory, by sample and by batch, equal a plain loop."""
    data = TensorDataset(torch.arange(26))

    def by_batch() -> DataLoader[Any]:
        batches = BatchSampler(RandomSampler(data, generator=generator()), 4, False)
        return DataLoader(data, batch_size=None, sampler=batches)

    assert same(epochs(data_of(by_batch())), plain_epochs(by_batch()))
    assert same(
        epochs(data_of(DataLoader(data, 4, shuffle=True, generator=generator()))),
        plain_epochs(DataLoader(data, 4, shuffle=True, generator=generator())),
    )


def test_nothing_is_seeded_when_keyed_by_none() -> None:
    """The order is equal, and random numbers come from the process's RNGs."""
    order = DataOrder(seed=3, keyed_by="none")

    def indices() -> DataLoader[int]:
        return DataLoader(Indices(26), 4, shuffle=True)

    quiet, keyed = data_of(indices(), order), data_of(indices(), DataOrder(seed=3))
    assert same(epochs(quiet), epochs(keyed))
    state = torch.get_rng_state()
    next(data_of(DataLoader(Drawing(26), 4), order).epoch(0))
    assert not torch.equal(torch.get_rng_state(), state)
