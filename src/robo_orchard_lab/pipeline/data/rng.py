"""Random number generation while data is loaded.

- :func:`epoch_seed`, :func:`indexed_seed`, :func:`seed_rng`: seeds
- :class:`RngIsolation`, :class:`PersistentRng`: contexts that restore the process's global RNGs
- :func:`dataset_generators`, :func:`loader_generators`: generators that a dataset or loader holds
- :class:`ReseededDataset`: an iterable dataset whose persistent workers are reseeded every epoch
"""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from ctypes import c_uint32
from enum import IntEnum
from functools import partial
from hashlib import blake2b
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import IterableDataset, get_worker_info

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.state_schema import errors_of


class RngStream(IntEnum):
    """Independent random streams of an epoch."""

    ORDER = 0
    LOADING = 1
    COLLATING = 2
    WORKERS = 3


def epoch_seed(seed: int, epoch_id: int, stream: RngStream) -> int:
    """Return a 64-bit seed, a hash of its arguments."""
    text = f"{seed}/{epoch_id}/{int(stream)}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def indexed_seed(seed: int, index: int) -> int:
    """Return the 64-bit seed of a batch or sample.

    The lower 32 bits, all that torch uses on a CPU, differ for 2**32 consecutive indices.
    """
    return (seed + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF


def seed_rng(seed: int, *, cuda: bool = False) -> None:
    """Seed the global RNGs of torch, NumPy and Python, each differently.

    Args:
        seed: from 0 to 2**64 - 1.
        cuda: seed the CUDA devices in addition to the CPU.
    """
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 90 us
    if cuda and torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    np.random.seed((seed ^ 0x5DEECE66) & 0xFFFFFFFF)
    random.seed(seed ^ 0xC2B2AE35)


_PYTHON_RNG: Any = random.random.__self__  # type: ignore[attr-defined]  # of a bound method
_PYTHON_READS = 100  # after a draw outside of loading, as of a hook


class RngIsolation:
    """Reusable context that restores the global RNGs of torch (CPU), NumPy and Python on exit.

    The body starts in an undefined state and should call :func:`seed_rng` first. Not reentrant.

    The bit generator beneath NumPy's RNG is swapped in 0.4 us; reading its state costs 55 us. But a
    swap drops the second gaussian of a pair, which NumPy caches elsewhere. Caching one advances the
    generator, so the state is read only if the generator advanced, or if a gaussian was cached
    before. The position is read at NumPy's documented ``BitGenerator.ctypes.state_address``, unless
    the memory there differs from the public state.

    Reading the state of Python's RNG costs 9 us. It is left out if the RNG still yields the number
    that follows the state of the use before: 32 bits, drawn on entry. If the number differs, the
    state is read and set back by this number. An equal number after draws has a chance of 2**-32.
    """

    def __init__(self) -> None:
        self._torch: torch.Tensor | None = None
        self._python: tuple[Any, ...] = ()
        self._next_python: int | None = None  # follows the state; None to read the state
        self._reads_left = 0  # of the state, before the next comparison
        self._inner = np.random.MT19937(0)
        self._outer: Any = None
        self._words: Any = None
        self._position: tuple[int, int, int] | None = None
        self._with_gaussian: Any = None  # complete state of NumPy's RNG, if a gaussian is cached

    def __enter__(self) -> None:
        self._torch = torch.default_generator.get_state()
        self._save_python()
        outer = get_bit_generator()
        if outer is not self._outer:
            self._outer, self._position, self._words = outer, None, _words_of(outer)
        words = self._words
        position = None if words is None else (words[624], words[0], words[623])
        if position is None or position != self._position or self._with_gaussian is not None:
            state = np.random.get_state(legacy=False)
            self._with_gaussian = state if state["has_gauss"] else None
            self._position = position
        set_bit_generator(self._inner)

    def __exit__(self, *error: object) -> None:
        assert self._torch is not None  # set on entry
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        set_bit_generator(self._outer)
        if self._with_gaussian is not None:
            np.random.set_state(self._with_gaussian)

    def _save_python(self) -> None:
        if self._next_python is None:
            self._python = random.getstate()
            self._reads_left -= 1
            if self._reads_left <= 0:
                following = random.Random()
                following.setstate(self._python)
                self._next_python = following.getrandbits(32)
        elif (
            random.getrandbits(32) != self._next_python or _PYTHON_RNG.gauss_next != self._python[2]
        ):
            version, (*words, position), gauss = random.getstate()
            self._python = version, (*words, position - 1), gauss
            self._next_python, self._reads_left = None, _PYTHON_READS

    def __reduce__(self) -> tuple[type[RngIsolation], tuple[()]]:
        return RngIsolation, ()  # has no state between two uses


def _words_of(generator: Any) -> Any:
    """Return the memory of an MT19937: 624 words and the position; None for another layout."""
    if type(generator) is not np.random.MT19937:
        return None
    words = (c_uint32 * 625).from_address(generator.ctypes.state_address)
    state = generator.state["state"]
    return words if [*words] == [*state["key"], state["pos"]] else None


class PersistentRng(RngIsolation):
    """Reusable context whose body continues random streams of its own, seeded once.

    Args:
        seed: from 0 to 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._own: tuple[torch.Tensor, tuple[Any, ...]] | None = None

    def __enter__(self) -> None:
        super().__enter__()
        if self._own is None:
            seed_rng(self._seed)
        else:
            torch.set_rng_state(self._own[0])
            random.setstate(self._own[1])

    def __exit__(self, *error: object) -> None:
        self._own = torch.get_rng_state(), random.getstate()
        super().__exit__(*error)

    @staticmethod
    def drop_cached_gaussian() -> None:
        """Forget NumPy's cached gaussian, as leaving and reentering the context does."""
        set_bit_generator(get_bit_generator())


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


def seed_generators(generators: Mapping[str, RandomGenerator], seed: int) -> None:
    """Seed each generator differently; ``seed`` is from 0 to 2**64 - 1."""
    for number, generator in enumerate(generators.values(), start=1):
        own = indexed_seed(seed, number << 40)  # lower indices belong to batches and samples
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own & 0xFFFFFFFF)
        else:
            generator.seed(own)


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


class ReseededDataset(IterableDataset[Any]):
    """Iterable dataset that seeds its worker by (seed, epoch, worker) in every epoch.

    A plain loader seeds workers once, at their start. Each iteration in a worker advances
    ``epoch_id``, the epoch of the next iteration.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.seed = 0
        self.epoch_id = 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        key = epoch_seed(self.seed, self.epoch_id, RngStream.WORKERS)
        seed = indexed_seed(key, 0 if info is None else info.id)
        seed_rng(seed)
        seed_generators(dataset_generators("", self.dataset), seed)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch_id)
        self.epoch_id += 1
        return iter(self.dataset)
