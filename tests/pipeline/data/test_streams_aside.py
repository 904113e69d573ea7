"""The process's random streams: seen to move, put back, and put aside."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import DataLoader

from loaded_data import Drawing, data_of, epochs, same, streams
from robo_orchard_lab.pipeline.data import DataOrder, streams_aside
from robo_orchard_lab.pipeline.data.random_keys import seed_streams
from robo_orchard_lab.pipeline.data.streams_aside import StreamsAside

SEEDS = count(5)
DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1),
    "torch, many": lambda: torch.rand(624 * 5),
    "torch normal": lambda: torch.randn(1),
    "torch double normal": lambda: torch.randn(1, dtype=torch.float64),
    "torch permutation": lambda: torch.randperm(5),
    "torch seed": lambda: torch.manual_seed(next(SEEDS)),
    "numpy": lambda: np.random.rand(),
    "numpy, many": lambda: np.random.rand(312 * 5),
    "numpy normal": lambda: np.random.randn(2),
    "numpy seed": lambda: np.random.seed(next(SEEDS)),
    "python": lambda: random.random(),
    "python, many": lambda: [random.random() for _ in range(312 * 5)],
    "python normal": lambda: random.gauss(),
    "python seed": lambda: random.seed(next(SEEDS)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_is_seen_and_put_back(draw: str, waiting: bool) -> None:
    """Once and again, also the second of two gaussians of torch's and Python's."""
    aside = StreamsAside()
    if waiting:
        torch.randn(1), random.gauss()  # each leaves another one
    for _ in range(2):
        before = streams()
        assert aside.note()
        assert not aside.moved()
        DRAWS[draw]()
        assert aside.moved()
        aside.put_back()
        assert same(streams(), before)
        DRAWS[draw]()


def test_a_gaussian_that_waits_in_numpy_is_drawn_without_a_trace() -> None:
    """Which is known before, so that nothing is taken for not drawn."""
    aside = StreamsAside()
    np.random.randn()
    assert not aside.note()
    np.random.randn()
    assert aside.note()


class Elsewhere:
    """In place of looks: a process in which the streams don't lie where they are expected."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __enter__(self) -> None:
        self.before = get_bit_generator()
        if self.generator is not None:
            set_bit_generator(self.generator)

    def __exit__(self, *error: object) -> None:
        set_bit_generator(self.before)


@pytest.mark.parametrize("generator", [None, np.random.PCG64(4)], ids=["no looks", "PCG64"])
def test_streams_that_cannot_be_looked_at_are_put_aside(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every batch is seeded for, and the process draws on as ever."""
    expected = epochs(data_of(DataLoader(Drawing(), 4)), 1)
    if generator is None:
        monkeypatch.setattr(streams_aside, "stream_looks", lambda generator: None)
    with Elsewhere(generator):
        aside = StreamsAside()
        assert not aside.note()
        before = [torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()]
        with aside:
            seed_streams(9)
            torch.randn(1), np.random.randn(), random.gauss()
        assert same(
            [torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()],
            before,
        )
        assert same(epochs(data_of(DataLoader(Drawing(), 4)), 1), expected)


class DrawsLate(Drawing):
    """Draws for one sample only, by one of the three."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.reads: list[int] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.reads.append(index)
        return torch.tensor(index), torch.tensor(self.draw() if index in (13, 20) else 0.0)


LATE: list[Callable[[], float]] = [
    lambda: float(torch.rand(())),
    lambda: float(np.random.randn()),
    random.gauss,
]


@pytest.mark.parametrize("draw", LATE, ids=["torch", "numpy", "python"])
@pytest.mark.parametrize("keyed_by", ["batch", "sample"])
def test_batches_are_seeded_for_from_the_first_that_draws(
    keyed_by: Any, draw: Callable[[], float]
) -> None:
    """It alone is loaded twice, and what it draws is what a worker draws for it."""
    dataset = DrawsLate(draw)
    order = DataOrder(7, keyed_by)
    before = streams()
    alone = epochs(data_of(DataLoader(dataset, 4), order), 1)
    assert same(streams(), before)
    assert dataset.reads == [*range(16), *range(12, 26)]
    loader = DataLoader(DrawsLate(draw), 4, num_workers=2)
    assert same(epochs(data_of(loader, order), 1), alone)


class FailsByChance(Drawing):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 9 and torch.rand(()) >= 0:
            raise ValueError("unlucky")
        return super().__getitem__(index)


def test_an_error_after_a_draw_leaves_the_streams_as_they_were() -> None:
    """The batch is loaded once more, seeded for, and its error is the user's."""
    before = streams()
    batches = data_of(DataLoader(FailsByChance(), 4)).epoch(0)
    with pytest.raises(ValueError, match="unlucky"):
        list(batches)
    assert same(streams(), before)
