"""RNG isolation restores the process's global RNGs and runs its body on seeded ones."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from loaded_data import rng_states, same
from robo_orchard_lab.pipeline.checkpoint import capture_random_state
from robo_orchard_lab.pipeline.data.fetching import PersistentRng, RngIsolation, seed_rng


@pytest.fixture(autouse=True)
def restored_rng() -> Iterator[None]:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def draw() -> list[float]:
    """Draw from all RNGs; an odd number of gaussians."""
    return [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random()]


def mixed_numbers() -> list[float]:
    """Draw numbers of different widths, a cached gaussian first."""
    return [random.gauss(0, 1), random.random(), random.getrandbits(700), np.random.randn()]


@pytest.mark.parametrize("draws", [0, 1, 623, 5000])
def test_isolation_restores_position_and_cached_gaussian(draws: int) -> None:
    """After several uses, the following numbers are those of an undisturbed process."""
    isolation = RngIsolation()
    random.seed(3)
    np.random.seed(3)
    for _ in range(draws):
        random.random()
        np.random.rand()
    for gaussians in (0, 1, 2, 3):
        random.gauss(0, 1)
        np.random.randn(gaussians)
        before = rng_states()
        state = random.getstate(), np.random.get_state()
        following = mixed_numbers()
        random.setstate(state[0])
        np.random.set_state(state[1])
        for _ in range(2):
            with isolation:
                seed_rng(9)
                draw()
            assert same(rng_states(), before)
        assert mixed_numbers() == following


def test_isolation_follows_another_bit_generator() -> None:
    """A process that replaces NumPy's bit generator gets back the one in use on entry."""
    isolation, before = RngIsolation(), get_bit_generator()
    try:
        for bit_generator in (before, np.random.MT19937(4), np.random.PCG64(4)):
            set_bit_generator(bit_generator)
            np.random.randn()
            state = str(np.random.get_state(legacy=False))
            with isolation:
                seed_rng(1)
                draw()
            assert get_bit_generator() is bit_generator
            assert str(np.random.get_state(legacy=False)) == state
    finally:
        set_bit_generator(before)


@pytest.mark.parametrize("words", [0, 1, 2, 5, 622, 623, 624, 625, 1248])
@pytest.mark.parametrize("gaussians", [0, 1])
@pytest.mark.parametrize("start", [0, 5])
def test_isolation_follows_draws_of_python_between_uses(
    words: int, gaussians: int, start: int
) -> None:
    """Python's RNG goes on after draws outside of the isolation, at any position in its block."""
    random.seed(3)
    random.getrandbits(32 * start + 1)
    random.gauss()
    alone, isolation = random.Random(), RngIsolation()
    alone.setstate(random.getstate())
    for _ in range(3):
        with isolation:
            seed_rng(1)
            draw()
        for rng in (random, alone):
            rng.getrandbits(32 * words)
            for _ in range(gaussians):
                rng.gauss()
        with isolation:
            seed_rng(2)
            random.gauss()
        assert random.random() == alone.random()
    for _ in range(700):
        assert random.getrandbits(32) == alone.getrandbits(32)
    assert random.gauss() == alone.gauss()


def test_isolation_follows_a_new_seed_of_python() -> None:
    """A hook that seeds Python's RNG between two uses gets the numbers, and saves the state."""
    isolation = RngIsolation()
    for _ in range(3):
        with isolation:
            seed_rng(1)
        random.seed(9)
        saved = capture_random_state()["python"]
        with isolation:
            seed_rng(2)
            draw()
        assert capture_random_state()["python"] == saved
        assert random.random() == random.Random(9).random()


@given(st.integers(0, 2**64 - 1))
def test_a_seed_sets_all_rngs_without_a_cached_gaussian(seed: int) -> None:
    """Equal seeds give equal numbers after any earlier draws; the three RNGs differ."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        seed_rng(seed)
        first = draw()
        random.gauss(0, 1)
        seed_rng(seed)
        assert random.getstate()[2] is None
        assert draw() == first
        assert len(set(first)) == 4
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def test_persistent_rng_continues_its_streams() -> None:
    """Several uses draw what one use draws that drops the cached gaussian in between."""
    several, one = PersistentRng(5), PersistentRng(5)
    drawn = []
    for _ in range(3):
        draw()
        with several:
            drawn.append(draw())
    with one:
        for numbers in drawn:
            assert draw() == numbers
            one.drop_cached_gaussian()
