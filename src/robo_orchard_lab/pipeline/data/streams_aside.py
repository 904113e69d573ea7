"""Drawing while a model trains, as if nothing had been drawn."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from robo_orchard_lab.pipeline.data.python_stream import PythonStream
from robo_orchard_lab.pipeline.data.random_keys import seed_streams
from robo_orchard_lab.pipeline.data.stream_looks import Look, StreamLooks, stream_looks


class StreamsAside:
    """A ``with`` whose body draws from other streams of torch (CPU), NumPy and Python.

    After it, the process draws what it would have drawn without. May be used again and again, not
    within itself. The streams of the body are left from the last use, so that a body seeds them
    first: some 25 us in all, in the middle of a training. Whether something draws at all is found
    out in 1 us::

        if aside.note():         # where the streams are
            something()
            if aside.moved():
                aside.put_back()
    """

    def __init__(self) -> None:
        self._other = np.random.MT19937(0)
        self._python = PythonStream()
        self._numpy: Any = None
        """The generator beneath ``np.random``. Changing it takes 0.4 us, reading and writing its
        state 55 us."""
        self._looks: StreamLooks | None = None
        self._seen: Look | None = None
        # Copies of the states, as they were at the last look.
        self._torch_state: torch.Tensor | None = None
        self._python_state: object = None
        self._numpy_state: Any = None
        self._gaussian_waits = False  # in NumPy's state, for the next draw

    def note(self) -> bool:
        """Remember where the streams are; False where they can be drawn from without a trace."""
        if get_bit_generator() is not self._numpy:
            self._numpy = get_bit_generator()
            self._looks, self._seen = stream_looks(self._numpy), None
        look = None if self._looks is None else self._looks.now()
        if look != self._seen or self._gaussian_waits or look is None:
            self._copy_what_moved(look)
        return look is not None and not self._gaussian_waits

    def moved(self) -> bool:
        """Whether anything was drawn since :meth:`note`, where that returned True."""
        looks = self._looks
        return looks is None or looks.now() != self._seen or get_bit_generator() is not self._numpy

    def put_back(self) -> None:
        """Draw from where :meth:`note` was called, again."""
        set_bit_generator(self._numpy)
        np.random.set_state(self._numpy_state)
        self._put_back_others()

    def __enter__(self) -> None:
        self.note()
        set_bit_generator(self._other)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        set_bit_generator(self._numpy)
        # The change has dropped the second of two gaussians, which waits outside of a generator.
        if self._gaussian_waits:
            np.random.set_state(self._numpy_state)
        self._put_back_others()

    def _put_back_others(self) -> None:
        if self._torch_state is not None:
            torch.set_rng_state(self._torch_state)
        self._python.restore(self._python_state)

    def _copy_what_moved(self, look: Look | None) -> None:
        seen, self._seen = self._seen, look
        everything = look is None or seen is None
        if everything or look[:2] != seen[:2]:  # type: ignore[index]  # neither is None
            self._torch_state = torch.get_rng_state()
        if everything or look[3:] != seen[3:]:  # type: ignore[index]
            self._python_state = self._python.state()
        if everything or look[2] != seen[2] or self._gaussian_waits:  # type: ignore[index]
            self._numpy_state = np.random.get_state(legacy=False)
            self._gaussian_waits = bool(self._numpy_state["has_gauss"])


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._aside.__exit__(kind, error, traceback)

    @staticmethod
    def between() -> None:
        """Drop NumPy's second gaussian of a pair, which does not outlive a use."""
        set_bit_generator(get_bit_generator())
