"""Seeing whether anything was drawn from the global random streams, without reading them."""

from __future__ import annotations

import random
import struct
from ctypes import c_char, c_void_p, string_at
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch

Look: TypeAlias = tuple[bytes, bytes, bytes, bytes, float | None]
"""Two parts of torch's stream, one of NumPy's and one of Python's, and its second gaussian."""

_View: TypeAlias = Any  # of some bytes, as they are
_WORDS = 624


class StreamLooks:
    """What differs in the streams of torch (CPU), NumPy and Python from one draw to the next.

    Each is a Mersenne Twister: 624 words, and how many are used up. Reading the three takes 25 us
    in the middle of a training; two looks at some bytes of them 1 us.
    """

    def __init__(self, torch_views: tuple[_View, _View], numpy: _View, python: _View) -> None:
        self._torch, self._torch_gaussians = torch_views
        self._numpy = numpy
        self._python = python
        self._python_generator = _python_generator()

    def now(self) -> Look:
        """Equal to another one where nothing was drawn between.

        But for the second of two gaussians of NumPy's, which leaves no trace here.
        """
        return (
            self._torch.raw,
            self._torch_gaussians.raw,
            self._numpy.raw,
            self._python.raw,
            self._python_generator.gauss_next,
        )


def stream_looks(numpy_generator: Any) -> StreamLooks | None:
    """Into the global streams; None where one does not lie in memory as expected.

    Args:
        numpy_generator: the one beneath the functions of ``np.random``.
    """
    if type(numpy_generator) is not np.random.MT19937 or not _torchs_gaussians_are_seen():
        return None
    torchs = _views_of_torchs(torch.default_generator)
    python = _view_of_pythons()
    if torchs is None or python is None:
        return None
    last_word = numpy_generator.ctypes.state_address + (_WORDS - 1) * 4
    return StreamLooks(torchs, _view(last_word, 8), python)  # and how many are used up


def _view(address: int, size: int) -> _View:
    return (c_char * size).from_address(address)


def _python_generator() -> Any:
    return cast(Any, random.random).__self__  # what the functions of random are methods of


def _view_of_pythons() -> _View | None:
    """How many words are used up, and the first two; the first one is the same for all seeds."""
    generator = _python_generator()
    if type(generator).__basicsize__ < object.__basicsize__ + (1 + _WORDS) * 4:
        return None
    address = id(generator) + object.__basicsize__
    words = random.getstate()[1]
    expected = struct.pack(f"<{_WORDS + 1}I", words[_WORDS], *words[:_WORDS])
    return _view(address, 12) if string_at(address, len(expected)) == expected else None


_HEAD = struct.Struct("<Qi?3xI")  # seed, words left, whether it is seeded, the next word
_SAVED_HEAD = struct.Struct("<QiiQ")
_GAUSSIANS = 4 + 8 + 4 + 16  # the last word, a float and a double that may wait
_BEFORE = 160  # more than a generator has before its words
_TORCHS = _BEFORE + _WORDS * 4 + _GAUSSIANS


def _views_of_torchs(generator: torch.Generator) -> tuple[_View, _View] | None:
    """Its head with the first word, and the gaussians that may wait; None if not found."""
    if type(generator).__basicsize__ < object.__basicsize__ + 8:
        return None
    address = c_void_p.from_address(id(generator) + object.__basicsize__).value
    if address is None or not _is_readable(address, _TORCHS):
        return None
    state = generator.get_state().numpy().tobytes()
    if len(state) < _SAVED_HEAD.size + _WORDS * 8:
        return None
    seed, left, seeded, following = _SAVED_HEAD.unpack_from(state)
    words = struct.unpack_from(f"<{_WORDS}Q", state, _SAVED_HEAD.size)
    begin = string_at(address, _TORCHS).find(struct.pack(f"<{_WORDS}I", *words))
    if begin < _HEAD.size:
        return None
    head = address + begin - _HEAD.size
    if _HEAD.unpack(string_at(head, _HEAD.size)) != (seed, left, bool(seeded), following):
        return None
    last_word = address + begin + (_WORDS - 1) * 4
    return _view(head, _HEAD.size + 4), _view(last_word, _GAUSSIANS)


def _torchs_gaussians_are_seen() -> bool:
    """Tried on another generator: whether draws are told apart, those that wait included."""
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    views = _views_of_torchs(generator)
    if views is None:
        return False
    looks = [tuple(view.raw for view in views)]
    for dtype in (torch.float64, torch.float64, torch.float32, torch.float32):
        torch.randn(1, generator=generator, dtype=dtype)
        looks.append(tuple(view.raw for view in views))
    return all(before != after for before, after in pairwise(looks))


def _is_readable(address: int, size: int) -> bool:
    """Whether a range of memory is the process's to read, as Linux tells."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    for line in maps.splitlines():
        bounds, access, *_ = line.split()
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address and address + size <= last:
            return access.startswith("r")
    return False
