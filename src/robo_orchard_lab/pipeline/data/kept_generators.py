"""The random generators that a dataset draws from, anywhere in it and in its code."""

from __future__ import annotations

import dis
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
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
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"numpy", "torch"}
"""Whose classes keep no generator but in their objects."""


def kept_generators(name: str, root: Any) -> dict[str, RandomSource]:
    """Those of torch, NumPy and Python that an object draws from, by their place.

    Of it, its attributes and theirs, and of its functions and methods: what these enclose, have as
    defaults, and use of their module. Long lists are passed by, and so is what is far away.
    """
    found: dict[str, RandomSource] = {}
    seen = {id(root), *_global_streams()}
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


def _global_streams() -> tuple[int, int]:
    """Those beneath ``random.random`` and ``np.random.rand``, which are seeded by themselves."""
    shared: Any = (random.random, np.random.rand)
    return id(shared[0].__self__), id(shared[1].__self__)


def _parts(place: str, holder: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, (MethodType, BuiltinMethodType)):
        yield place, holder.__self__
        yield f"{place}()", getattr(holder, "__func__", None)
    elif isinstance(holder, FunctionType):
        yield from _parts_of_function(place, holder)
    elif isinstance(holder, partial):
        yield f"{place}.func", holder.func
        yield f"{place}.args", holder.args
        yield f"{place}.keywords", holder.keywords
    elif isinstance(holder, (list, tuple)):
        if len(holder) <= _MOST_ITEMS:
            yield from ((f"{place}[{index}]", item) for index, item in enumerate(holder))
    elif isinstance(holder, Mapping):
        if len(holder) <= _MOST_ITEMS:
            yield from ((f"{place}[{key!r}]", item) for key, item in holder.items())
    else:
        attributes = getattr(holder, "__dict__", None) or {}
        yield from ((f"{place}.{key}", item) for key, item in list(attributes.items()))
        for kind in type(holder).__mro__:
            if kind.__module__.partition(".")[0] not in _LIBRARIES:
                yield from _parts_of_class(place, holder, kind)


def _parts_of_class(place: str, holder: Any, kind: type) -> Iterator[tuple[str, Any]]:
    slots = kind.__dict__.get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else tuple(slots):
        yield f"{place}.{name}", getattr(holder, name, None)
    for name, value in list(vars(kind).items()):
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if isinstance(value, (FunctionType, *GENERATORS)):
            yield f"{place}.{kind.__qualname__}.{name}", value


def _parts_of_function(place: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{place}({name})", cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    yield f"{place}(defaults)", function.__defaults__
    yield f"{place}(keyword defaults)", function.__kwdefaults__
    yield f"{place}(wraps)", getattr(function, "__wrapped__", None)
    for name in sorted(_globals_of(function.__code__)):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType):
            if value.__module__ == function.__module__:
                yield f"{function.__module__}.{name}", value
        elif isinstance(value, GENERATORS) or callable(value):
            yield f"{function.__module__}.{name}", value


def _globals_of(code: CodeType) -> set[str]:
    """The names that code reads from its module, that of functions in it included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = (_globals_of(value) for value in code.co_consts if isinstance(value, CodeType))
    return names.union(*inner)


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
