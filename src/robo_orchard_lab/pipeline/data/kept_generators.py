"""The random generators that a dataset keeps, anywhere in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from robo_orchard_lab.pipeline.data.random_keys import numbered_seed

RandomSource: TypeAlias = Any
"""One of :data:`GENERATORS`."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_MOST_ITEMS = 64  # of a list of transforms; one of samples is longer
_MOST_LOOKED_AT = 2_000
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, type, ModuleType)


def kept_generators(name: str, root: Any) -> dict[str, RandomSource]:
    """Those of torch, NumPy and Python in an object, its attributes and theirs, by their place.

    Long lists are passed by, and so is what is far away.
    """
    found: dict[str, RandomSource] = {}
    seen = {id(root)}
    waiting = deque([(name, root)])
    while waiting and len(seen) < _MOST_LOOKED_AT:
        place, holder = waiting.popleft()
        for part_name, part in _parts(place, holder):
            if id(part) in seen or isinstance(part, _LEAVES) or part is None:
                continue
            seen.add(id(part))
            if isinstance(part, GENERATORS):
                found[part_name] = part
            else:
                waiting.append((part_name, part))
    return found


def _parts(place: str, holder: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, MethodType):
        yield place, holder.__self__
    elif isinstance(holder, FunctionType):
        return
    elif isinstance(holder, (list, tuple)):
        if len(holder) <= _MOST_ITEMS:
            yield from ((f"{place}[{index}]", item) for index, item in enumerate(holder))
    elif isinstance(holder, Mapping):
        if len(holder) <= _MOST_ITEMS:
            yield from ((f"{place}[{key!r}]", item) for key, item in holder.items())
    else:
        attributes = getattr(holder, "__dict__", None) or {}
        yield from ((f"{place}.{key}", item) for key, item in list(attributes.items()))


def seed_generators(generators: Mapping[str, RandomSource], seed: int) -> None:
    """Have each draw from a stream of its own of a seed."""
    for number, generator in enumerate(generators.values(), start=1):
        own = numbered_seed(seed, number << 40)  # batches and samples are the neighbours
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own & 0xFFFFFFFF)
        else:
            generator.seed(own)


def states_of(generators: Mapping[str, RandomSource]) -> list[Any]:
    """Where each is in its stream, in its own form."""
    return [_state(generator) for generator in generators.values()]


def set_states(generators: Mapping[str, RandomSource], states: list[Any]) -> None:
    """Have each draw from where :func:`states_of` was called."""
    for generator, state in zip(generators.values(), states, strict=True):
        _set_state(generator, state)


def _state(generator: RandomSource) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state(generator: RandomSource, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    else:
        generator.setstate(state)
