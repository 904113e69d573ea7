"""Iterable data resumes from its own state, by reading again, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loaded_data import data_of, epochs, resumed, rng_states, same
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress

BATCHES = 7


class Stream(IterableDataset[Any]):
    """Dataset that shuffles by torch and draws from NumPy for each sample."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(26).tolist():
            yield index, np.random.randn()


class StatefulStream(IterableDataset[Any]):
    """Dataset that saves how many samples it yielded."""

    def __init__(self) -> None:
        self.given = 0
        self.skip = 0
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.given, self.skip = self.skip, 0
        for index in range(self.given, 26):
            self.given = index + 1
            self.reads += 1
            yield index, np.random.randn()

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["given"]


class StatefulLoader:
    """Custom loader with the protocol of torchdata's."""

    def __init__(self) -> None:
        self.stream = StatefulStream()

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.stream, 4))

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class Batches:
    """Iterable of a custom class, without a length."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(BATCHES):
            yield torch.rand(4) + index


class Repeating(DataLoader[Any]):
    """Loader with custom iteration: yields each batch twice, with noise."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch + torch.rand(4)


LOADERS: dict[str, Any] = {
    "stateful dataset": lambda: DataLoader(StatefulStream(), 4),
    "stateful loader": StatefulLoader,
    "list": lambda: [torch.full((4,), float(index)) for index in range(BATCHES)],
    "stream": lambda: DataLoader(Stream(), 4),
    "stream in workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "stream in persistent workers": lambda: DataLoader(
        Stream(), 4, num_workers=2, persistent_workers=True
    ),
    "complete batches": lambda: DataLoader(Stream(), batch_size=None),
    "subclass": lambda: Repeating(torch.arange(12.0), 4, shuffle=True, num_workers=1),  # type: ignore[arg-type]  # has an index
    "iterable": Batches,
}
UNABLE = [
    "stream",
    "stream in workers",
    "stream in persistent workers",
    "complete batches",
    "subclass",
    "iterable",
]


def positions(make: Any, order: DataOrder) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the batches of an epoch, the states between them, and the next epoch's batches."""
    progress = TrainerProgress()
    data = data_of(make(), order, progress)
    batches: list[Any] = []
    states: list[Any] = [(data.state_dict(), data.rank_state_dict())]
    for batch in data.epoch(0):
        batches.append(batch)
        progress.finish_step()
        states.append((data.state_dict(), data.rank_state_dict()))
    progress.finish_epoch()
    return batches, states, list(data.epoch(1))


@pytest.mark.parametrize("kind", LOADERS)
def test_run_resumes_at_every_step(kind: str) -> None:
    """The rest and the next epoch are equal, from a saved state or by reading again."""
    order = DataOrder(seed=7, fast_forward=kind in UNABLE)
    batches, states, following = positions(LOADERS[kind], order)
    for step_id, (state, rank_state) in list(enumerate(states))[:9:2]:
        data = resumed(LOADERS[kind](), state, order, rank_state)
        assert same(list(data.epoch(0, step_id)), batches[step_id:])
        assert same(list(data.epoch(1)), following)
    assert same(list(data_of(LOADERS[kind]()).epoch(1)), following)
    assert same(batches, following) is (kind == "list")


@pytest.mark.parametrize("kind", UNABLE)
def test_stateless_data_is_refused_within_an_epoch(kind: str) -> None:
    """Reading again needs fast_forward=True; between epochs, nothing is to be read."""
    order = DataOrder(seed=7)
    _, states, _ = positions(LOADERS[kind], order)
    with pytest.raises(StateError, match=r"after 3 steps .* DataOrder\(fast_forward=True\)"):
        resumed(LOADERS[kind](), states[3][0], order, states[3][1])
    resumed(LOADERS[kind](), states[0][0], order, states[0][1])


def test_stateful_stream_is_not_read_again() -> None:
    """The dataset yields the remaining samples only."""
    _, states, _ = positions(LOADERS["stateful dataset"], DataOrder(seed=7))
    stream = StatefulStream()
    data = resumed(DataLoader(stream, 4), states[5][0], None, states[5][1])
    list(data.epoch(0, 5))
    assert stream.reads == 6


@pytest.mark.parametrize("kind", ["stateful dataset", "stateful loader"])
def test_prefetched_batches_have_their_steps_state(kind: str) -> None:
    """Each step has its state if three batches are read at a time for accumulation windows."""
    batches, states, _ = positions(LOADERS[kind], DataOrder(seed=7))
    progress = TrainerProgress()
    data = data_of(LOADERS[kind](), progress=progress)
    given = data.epoch(0)
    for _ in range(2):
        for _ in range(3):
            next(given)
        for _ in range(3):
            progress.finish_step()
            step_id = progress.step_id
            assert (data.state_dict(), data.rank_state_dict()) == states[step_id]
    assert same(list(given), batches[6:])


@pytest.mark.parametrize("kind", LOADERS)
def test_reading_leaves_the_processs_rngs_unchanged(kind: str) -> None:
    """Neither creating the iterator nor reading changes the global RNGs."""
    before = rng_states()
    list(data_of(LOADERS[kind]()).epoch(0))
    assert same(rng_states(), before)


class Drawn(IterableDataset[Any]):
    """Dataset that draws its samples when an iteration begins."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.rand(26).tolist())


class Same(DataLoader[Any]):
    """Loader of another class, which is iterated itself."""


@pytest.mark.parametrize("has_generator", [False, True])
@pytest.mark.parametrize(
    "options", [{"batch_size": None}, {}, {"batch_size": 4}, {"batch_size": 4, "drop_last": True}]
)
@pytest.mark.parametrize("collate_fn", [None, str])
def test_a_stream_has_the_batches_of_its_loader(
    options: dict[str, Any], collate_fn: Any, has_generator: bool
) -> None:
    """A stream of the training process is read without its loader, with the same batches.

    The loader's generator continues as the loader leaves it.
    """
    found, ends = [], []
    for loader in (DataLoader, Same):
        generator = torch.Generator().manual_seed(3) if has_generator else None
        data = data_of(loader(Drawn(), collate_fn=collate_fn, generator=generator, **options))
        found.append([[*data.epoch(0)], [*data.epoch(1)]])
        ends.append(None if generator is None else generator.get_state())
    assert same(*found)
    assert same(*ends)


class Longer(Drawn):
    def __len__(self) -> int:
        return 8


def test_a_stream_longer_than_its_length_is_warned_of() -> None:
    """A stream with more samples than its dataset states has the warning of its loader."""
    loader = DataLoader(Longer(), batch_size=None)
    assert len(loader) == 8  # without a question for the length, torch does not warn
    with pytest.warns(UserWarning, match="reported to be 8"):
        assert len([*data_of(loader).epoch(0)]) == 26


def test_samples_of_streams_are_numbered() -> None:
    """Numbers count on over the batches, also after a resume."""
    progress = TrainerProgress()
    data = data_of(LOADERS["stateful dataset"](), progress=progress)
    numbers = []
    for _ in data.epoch(0):
        numbers.append(data.sample_numbers)
        progress.finish_step()
        if progress.step_id == 3:
            state, rank_state = data.state_dict(), data.rank_state_dict()
    assert numbers == [range(i, min(i + 4, 26)) for i in range(0, 26, 4)]
    assert data.sample_numbers is data.sample_indices is None
    again = resumed(LOADERS["stateful dataset"](), state, None, rank_state)
    next(again.epoch(0, 3))
    assert again.sample_numbers == range(12, 16)


def test_custom_iteration_is_kept() -> None:
    """A loader with an `__iter__` of its own gives its batches, also with persistent workers."""
    numbers: Any = torch.arange(12.0)
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
    loader = Repeating(numbers, 4, **options)
    batches = list(data_of(loader, DataOrder(keyed_by="none")).epoch(0))
    assert [len(batch) for batch in batches] == [4] * 6


def test_streams_are_not_keyed_by_sample() -> None:
    """The error is raised when the trainer is built."""
    with pytest.raises(PipelineConfigError, match="keyed_by='sample' needs a DataLoader of"):
        data_of(Batches(), DataOrder(keyed_by="sample"))


def test_different_data_is_refused() -> None:
    """Refused are a different kind, a different type, and data without load_state_dict."""
    _, states, _ = positions(LOADERS["stateful dataset"], DataOrder(seed=7))
    state, rank_state = states[3]
    with pytest.raises(StateError, match=r"of type DataLoader when .* saved, and is Batches"):
        resumed(Batches(), state, None, rank_state)
    with pytest.raises(StateError, match="DataLoader has no state_dict and load_state_dict"):
        resumed(DataLoader(Stream(), 4), state, None, rank_state)
    with pytest.raises(StateError, match=r"an iterable of batches when .* saved, and is a Data"):
        resumed(DataLoader([1, 2]), state, None, rank_state)  # type: ignore[arg-type]  # a list has an index


def test_a_list_is_iterated_every_epoch() -> None:
    """Two epochs of a list are the list twice."""
    batches = LOADERS["list"]()
    assert same(epochs(data_of(batches)), [batches, batches])


def test_fast_forward_ignores_a_saved_state() -> None:
    """Some states lack what reading again restores."""
    order = DataOrder(seed=7, fast_forward=True)
    batches, states, _ = positions(LOADERS["stateful dataset"], order)
    stream = StatefulStream()
    data = resumed(DataLoader(stream, 4), states[5][0], order, states[5][1])
    assert same(list(data.epoch(0, 5)), batches[5:])
    assert stream.reads == 26
