"""Drawing while a model trains, as if nothing had been drawn."""

from __future__ import annotations

import random
from ctypes import c_int32, c_uint32
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from robo_orchard_lab.pipeline.data.python_stream import PythonStream
from robo_orchard_lab.pipeline.data.random_keys import seed_streams


class StreamsAside:
    """A ``with`` whose body draws from other streams of torch (CPU), NumPy and Python.

    After it, the process draws what it would have drawn without. May be used again and again, not
    within itself. The streams of the body are left from the last use, so that a body seeds them
    first. Some 3 us.
    """

    def __init__(self) -> None:
        self._numpy = _NumpyAside()
        self._python = _PythonAside()
        self._torch: torch.Tensor | None = None

    def __enter__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python.put_aside()
        self._numpy.put_aside()

    def __exit__(self, *error: object) -> None:
        if self._torch is not None:
            torch.set_rng_state(self._torch)
        self._python.take_back()
        self._numpy.take_back()


class ContinuedStreams:
    """A ``with`` whose body draws from streams of its own, which begin with a seed and go on.

    Many uses draw what one does that calls :meth:`between` where the others have their ends.
    """

    def __init__(self, seed: int) -> None:
        self._aside = StreamsAside()
        self._seed: int | None = seed
        self._torch: torch.Tensor | None = None
        self._python: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._aside.__enter__()
        if self._seed is not None:
            seed_streams(self._seed)
            self._seed = None
        elif self._torch is not None:
            torch.set_rng_state(self._torch)
            random.setstate(self._python)

    def __exit__(self, *error: object) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._aside.__exit__(*error)

    @staticmethod
    def between() -> None:
        """Drop NumPy's second gaussian of a pair, which does not outlive a use."""
        set_bit_generator(get_bit_generator())


class _PythonAside:
    """Python's global stream, copied and put back."""

    def __init__(self) -> None:
        self._stream = PythonStream()
        self._state: object = None

    def put_aside(self) -> None:
        self._state = self._stream.state()

    def take_back(self) -> None:
        self._stream.restore(self._state)


class _NumpyAside:
    """NumPy's global stream, changed for another one and back.

    Its state takes 55 us to read and to write, changing the generator beneath it 0.4 us. But that
    drops the second number of a pair of gaussians, which waits outside of the generator for the
    next call. Such a pair has moved the generator, so that the state is read only where it has
    moved since, or where a number waited then.
    """

    def __init__(self) -> None:
        self._other = np.random.MT19937(0)
        self._own: Any = None
        self._watched: _Twister | None = None
        self._seen: _Place | None = None
        self._state: Any = None
        """The whole state, where a gaussian waits."""

    def put_aside(self) -> None:
        own = get_bit_generator()
        if own is not self._own:
            self._own, self._watched, self._seen = own, _watch_numpy(own), None
        place = None if self._watched is None else self._watched.place()
        if place is None or place != self._seen or self._state is not None:
            state = np.random.get_state(legacy=False)
            self._state = state if state["has_gauss"] else None
            self._seen = place
        set_bit_generator(self._other)

    def take_back(self) -> None:
        set_bit_generator(self._own)
        if self._state is not None:
            np.random.set_state(self._state)


_WORDS = 624
_Place = tuple[int, int, int]


class _Twister:
    """A Mersenne Twister in memory, looked at without a call, which takes 0.1 us."""

    def __init__(self, position: int, words: int) -> None:
        self._position = c_int32.from_address(position)
        self._first = c_uint32.from_address(words)
        self._last = c_uint32.from_address(words + (_WORDS - 1) * 4)

    def place(self) -> _Place:
        """How many of its words are used up, and two of them, which change with all of them."""
        return self._position.value, self._first.value, self._last.value


def _watch_numpy(generator: Any) -> _Twister | None:
    if type(generator) is not np.random.MT19937:
        return None
    words = generator.ctypes.state_address
    return _Twister(words + _WORDS * 4, words)
