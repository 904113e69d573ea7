"""Python's random stream, copied in memory, is what its own functions read and write."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline.data.rng import PythonStream


@pytest.fixture(params=["in memory", "by functions"])
def stream(request: pytest.FixtureRequest) -> PythonStream:
    stream = PythonStream()
    assert stream._memory is not None  # as CPython, on which this runs, has it
    if request.param == "by functions":
        stream._memory = None
    return stream


def test_a_stream_goes_on_where_it_was(stream: PythonStream) -> None:
    """Restored, it gives the same numbers, the second gaussian of a pair included."""
    random.seed(3)
    for draws in (0, 1, 623, 5000):
        for _ in range(draws):
            random.random()
        random.gauss(0, 1)
        expected, state = random.getstate(), stream.state()
        following = [random.gauss(0, 1), random.random(), random.getrandbits(700)]
        random.seed(9)
        stream.restore(state)
        assert random.getstate() == expected
        assert [random.gauss(0, 1), random.random(), random.getrandbits(700)] == following


@given(st.integers(0, 2**32 - 1))
def test_a_seed_gives_the_numbers_that_numpy_makes_of_it(seed: int) -> None:
    """Both ways of seeding give one stream, without a gaussian left from before."""
    before = random.getstate()
    in_memory, by_functions = PythonStream(), PythonStream()
    by_functions._memory = None
    try:
        for stream in (in_memory, by_functions):
            random.gauss(0, 1)
            stream.seed(seed)
            expected = np.random.RandomState(seed).random_sample(3).tolist()
            assert [random.random() for _ in range(3)] == expected
            stream.seed(seed)
            assert random.getstate()[2] is None
    finally:
        random.setstate(before)
