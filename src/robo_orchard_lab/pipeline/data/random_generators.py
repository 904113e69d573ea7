"""Random generators that a dataset, a loader or a sampler holds: search, states, checks.

- :func:`dataset_generators`, :func:`loader_generators`: generators by their paths
- :func:`capture_generators`, :func:`restore_generators`: states as plain values and tensors
"""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.state_schema import errors_of

RandomGenerator: TypeAlias = Any
"""An instance of :data:`GENERATORS`."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_MAX_ITEMS = 64  # of a list of transforms; a list of samples is longer
_MAX_OBJECTS = 2_000
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, type, ModuleType, type(None))
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"numpy", "torch"}
"""Packages whose classes hold generators in instances only."""


def dataset_generators(path: str, root: Any) -> dict[str, RandomGenerator]:
    """Find the random generators held by an object, by their paths.

    The search follows attributes, slots, class attributes, arguments of partials, lists, tuples
    and mappings of at most 64 items, and what functions refer to: closures, defaults, globals
    (``inspect.getclosurevars``). It stops after 2,000 objects.
    """
    shared: Any = (random.random, np.random.rand)  # methods of the global RNGs, seeded separately
    seen = {id(root), *(id(method.__self__) for method in shared)}
    found: dict[str, RandomGenerator] = {}
    queue = deque([(path, root)])
    while queue and len(seen) < _MAX_OBJECTS:
        for child_path, child in _children(*queue.popleft()):
            if id(child) in seen or isinstance(child, _LEAVES):
                continue
            seen.add(id(child))
            if isinstance(child, GENERATORS):
                found[child_path] = child
            else:
                queue.append((child_path, child))
    return found


def _children(path: str, holder: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, (list, tuple)):
        if len(holder) <= _MAX_ITEMS:
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(holder))
    elif isinstance(holder, Mapping):
        if len(holder) <= _MAX_ITEMS:
            yield from ((f"{path}[{key!r}]", item) for key, item in holder.items())
    elif isinstance(holder, partial):
        yield from _children(path, (holder.func, holder.args, holder.keywords))
    elif isinstance(holder, (MethodType, BuiltinMethodType)):
        yield path, holder.__self__
        yield f"{path}()", getattr(holder, "__func__", None)
    elif isinstance(holder, FunctionType):
        yield from _function_children(path, holder)
    else:
        yield from _object_children(path, holder)


def _object_children(path: str, holder: Any) -> Iterator[tuple[str, Any]]:
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        yield f"{path}.{name}", value
    for cls in type(holder).__mro__:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            continue
        for name, value in list(vars(cls).items()):
            if inspect.ismemberdescriptor(value):  # a slot
                yield f"{path}.{name}", getattr(holder, name, None)
            elif isinstance(value, (staticmethod, classmethod)):
                yield f"{path}.{cls.__qualname__}.{name}", value.__func__
            elif isinstance(value, property):
                yield f"{path}.{cls.__qualname__}.{name}", value.fget
            elif isinstance(value, (FunctionType, *GENERATORS)):
                yield f"{path}.{cls.__qualname__}.{name}", value


def _function_children(path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    yield f"{path}(defaults)", function.__defaults__
    yield f"{path}(keyword defaults)", function.__kwdefaults__
    yield f"{path}(wraps)", getattr(function, "__wrapped__", None)
    try:
        names = inspect.getclosurevars(function)
    except ValueError:  # a closure variable is not assigned yet
        return
    for name, value in names.nonlocals.items():
        yield f"{path}({name})", value
    for name, value in sorted(names.globals.items()):
        is_foreign = isinstance(value, FunctionType) and value.__module__ != function.__module__
        if isinstance(value, GENERATORS) or (callable(value) and not is_foreign):
            yield f"{function.__module__}.{name}", value


def loader_generators(dataloader: Any) -> dict[str, RandomGenerator]:
    """Find the random generators of a loader, its samplers and its dataset, by their paths."""
    paths = [
        (f"{name}.{attribute}", value)
        for name, holder in [("loader", dataloader), *iter_samplers(dataloader)]
        for attribute, value in getattr(holder, "__dict__", {}).items()
        if isinstance(value, GENERATORS)
    ]
    paths += dataset_generators("dataset", getattr(dataloader, "dataset", None)).items()
    found: dict[str, RandomGenerator] = {}
    for path, value in paths:
        if not any(value is other for other in found.values()):
            found[path] = value
    return found


def iter_samplers(dataloader: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and object of each sampler of a loader, nested samplers included."""
    seen: list[Any] = []
    for path in ("sampler", "batch_sampler"):
        holder = getattr(dataloader, path, None)
        while holder is not None and not any(holder is other for other in seen):
            yield path, holder
            seen.append(holder)
            inner = "batch_sampler" if hasattr(holder, "batch_sampler") else "sampler"
            path, holder = f"{path}.{inner}", getattr(holder, inner, None)


def generator_states(generators: Mapping[str, RandomGenerator]) -> list[Any]:
    """Return the generators' native states."""
    return [_state(generator) for generator in generators.values()]


def set_generator_states(generators: Mapping[str, RandomGenerator], states: list[Any]) -> None:
    """Restore states of :func:`generator_states`."""
    for generator, state in zip(generators.values(), states, strict=True):
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif isinstance(generator, (torch.Generator, np.random.RandomState)):
            generator.set_state(state)
        else:
            generator.setstate(state)


def _state(generator: RandomGenerator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def capture_generators(generators: Mapping[str, RandomGenerator]) -> dict[str, Any]:
    """Return the generators' states by path, as plain values and tensors."""
    return dict(zip(generators, map(_to_plain, generator_states(generators)), strict=True))


def check_generators(state: Mapping[str, Any], generators: Mapping[str, RandomGenerator]) -> None:
    """Raise ``StateError`` if a state of :func:`capture_generators` does not fit."""
    if set(state) != set(generators):
        raise StateError(
            f"the data loader had the random generators {sorted(state)} when the run was saved, "
            f"and has {sorted(generators)}; restore the saved ones"
        )
    for path, generator in generators.items():
        with errors_of(f"data.random.{path}"):
            check_positions(state[path])
            set_generator_states({path: _new_like(generator)}, [_from_plain(state[path])])


def check_positions(state: Any) -> None:
    """Refuse positions beyond NumPy's buffers: NumPy reads there without a check."""
    if isinstance(state, Mapping):
        for name, size in (("pos", 624), ("buffer_pos", 4)):
            if name in state and not (type(state[name]) is int and 0 <= state[name] <= size):
                raise StateError(f"expected {name} from 0 to {size}, found {state[name]!r:.40}")
        for value in state.values():
            check_positions(value)


def _new_like(generator: RandomGenerator) -> RandomGenerator:
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device)
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)())
    return (
        np.random.RandomState() if isinstance(generator, np.random.RandomState) else random.Random()
    )


def restore_generators(state: Mapping[str, Any], generators: Mapping[str, RandomGenerator]) -> None:
    """Restore the states of :func:`capture_generators`."""
    set_generator_states(generators, [_from_plain(state[path]) for path in generators])


def _to_plain(value: Any) -> Any:
    """Convert NumPy arrays to int64 tensors with their dtype."""
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.astype(np.int64)), "dtype": value.dtype.name}
    return value.item() if isinstance(value, np.generic) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"array", "dtype"}:
            return value["array"].numpy().astype(value["dtype"])
        return {key: _from_plain(item) for key, item in value.items()}
    return value
