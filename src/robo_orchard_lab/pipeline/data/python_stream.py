"""Python's global random stream, quick to copy, to put back and to seed."""

from __future__ import annotations

import random
from ctypes import c_char, string_at
from typing import Any, cast

import numpy as np

_WORDS = 624
_STATE_BYTES = (1 + _WORDS) * 4
_ALL_USED = _WORDS.to_bytes(4, "little")  # so that the next number makes new words


class PythonStream:
    """What the functions of ``random`` draw from.

    Their own reading, writing and seeding of it takes 6, 2 and 3.5 us. It is a Mersenne Twister, as
    NumPy's is: the number of words that are used up, and 624 words. Where CPython has it in memory
    as expected, it is copied there, in 0.3 us; elsewhere by the functions of ``random``, with the
    same result.
    """

    def __init__(self) -> None:
        self._generator = cast("Any", random.random).__self__
        self._memory = _memory_of(self._generator)
        self._seeded = np.random.MT19937(0)
        self._seeder = np.random.RandomState(self._seeded)
        self._seeded_words: int = self._seeded.ctypes.state_address

    def state(self) -> object:
        """Where it is, for :meth:`restore`."""
        if self._memory is None:
            return random.getstate()
        return self._memory.raw, self._generator.gauss_next

    def restore(self, state: Any) -> None:
        """Draw from there again."""
        if self._memory is None:
            random.setstate(state)
        else:
            self._memory.raw, self._generator.gauss_next = state

    def seed(self, seed: int) -> None:
        """Begin with the words that NumPy's ``seed`` makes of 32 bits."""
        self._seeder.seed(seed)
        words = string_at(self._seeded_words, _WORDS * 4)
        if self._memory is None:
            numbers = map(int, np.frombuffer(words, dtype=np.uint32))
            random.setstate((3, (*numbers, _WORDS), None))
        else:
            self._memory.raw = _ALL_USED + words
            self._generator.gauss_next = None


def _memory_of(generator: Any) -> Any:
    """The state's bytes, themselves; None where they don't lie as CPython has them."""
    if type(generator).__basicsize__ < object.__basicsize__ + _STATE_BYTES:
        return None
    memory = (c_char * _STATE_BYTES).from_address(id(generator) + object.__basicsize__)
    *words, used = random.getstate()[1]
    expected = np.array([used, *words], dtype="<u4").tobytes()
    return memory if memory.raw == expected else None
