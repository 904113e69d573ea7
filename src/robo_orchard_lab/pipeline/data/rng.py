"""The random generators that a loader, its samplers and its dataset keep, as state."""

from __future__ import annotations

import dis
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from ctypes import c_char, c_int32, c_uint32, string_at
from enum import IntEnum
from functools import partial
from hashlib import blake2b
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import IterableDataset, get_worker_info

from robo_orchard_lab.pipeline.errors import StateError

# --- python stream ---------------------------------------------------------------------------
# Python's global random stream, quick to copy, to put back and to seed.


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


# --- random keys -----------------------------------------------------------------------------
# Seeds that follow from what they are for.


_python = PythonStream()


class RngStream(IntEnum):
    """What is drawn from a stream."""

    ORDER = 0
    LOADING = 1
    COLLATING = 2
    WORKERS = 3


def epoch_seed(seed: int, epoch_id: int, purpose: RngStream) -> int:
    """64 bits that belong to an epoch of a seed; those of others have nothing to do with them."""
    text = f"{seed}/{epoch_id}/{int(purpose)}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def indexed_seed(key: int, number: int) -> int:
    """The seed of one batch or sample of an epoch.

    Those of 2**32 neighbours differ also in their lower 32 bits, all that torch uses on a CPU.
    """
    return (key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF


def seed_rng(seed: int) -> None:
    """Have torch (CPU), NumPy and Python draw from the streams of a seed, which takes 4 us."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 90 us
    # The same seed would give all of them the same numbers.
    np.random.seed((seed ^ 0x5DEECE66) & 0xFFFFFFFF)
    _python.seed((seed ^ 0xC2B2AE35) & 0xFFFFFFFF)


def epoch_generator(seed: int, epoch_id: int, purpose: RngStream) -> torch.Generator:
    """A new generator of an epoch."""
    return torch.Generator().manual_seed(epoch_seed(seed, epoch_id, purpose))


# --- streams aside ---------------------------------------------------------------------------
# Drawing while a model trains, as if nothing had been drawn.


class RngIsolation:
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


class PersistentRng:
    """A ``with`` whose body draws from streams of its own, which begin with a seed and go on.

    Many uses draw what one does that calls :meth:`between` where the others have their ends.
    """

    def __init__(self, seed: int) -> None:
        self._aside = RngIsolation()
        self._seed: int | None = seed
        self._torch: torch.Tensor | None = None
        self._python: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._aside.__enter__()
        if self._seed is not None:
            seed_rng(self._seed)
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


# --- kept generators -------------------------------------------------------------------------
# The random generators that a dataset draws from, anywhere in it and in its code.


RandomGenerator: TypeAlias = Any
"""One of :data:`GENERATORS`."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_MOST_ITEMS = 64  # of a list of transforms; one of samples is longer
_MOST_LOOKED_AT = 2_000
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, type, ModuleType)
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"numpy", "torch"}
"""Whose classes keep no generator but in their objects."""


def dataset_generators(name: str, root: Any) -> dict[str, RandomGenerator]:
    """Those of torch, NumPy and Python that an object draws from, by their place.

    Of it, its attributes and theirs, and of its functions and methods: what these enclose, have as
    defaults, and use of their module. Long lists are passed by, and so is what is far away.
    """
    found: dict[str, RandomGenerator] = {}
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


def seed_generators(generators: Mapping[str, RandomGenerator], seed: int) -> None:
    """Have each draw from a stream of its own of a seed."""
    for number, generator in enumerate(generators.values(), start=1):
        own = indexed_seed(seed, number << 40)  # batches and samples are the neighbours
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own & 0xFFFFFFFF)
        else:
            generator.seed(own)


def generator_states(generators: Mapping[str, RandomGenerator]) -> list[Any]:
    """Where each is in its stream, in its own form."""
    return [_state(generator) for generator in generators.values()]


def set_generator_states(generators: Mapping[str, RandomGenerator], states: list[Any]) -> None:
    """Have each draw from where :func:`generator_states` was called."""
    for generator, state in zip(generators.values(), states, strict=True):
        _set_state(generator, state)


def _state(generator: RandomGenerator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state(generator: RandomGenerator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    else:
        generator.setstate(state)


# --- reseeded stream -------------------------------------------------------------------------
# A stream in workers that outlive an epoch, seeded anew for each.


class ReseededDataset(IterableDataset[Any]):
    """The user's dataset, whose workers draw from (seed, epoch, worker) in every epoch.

    A plain loader seeds workers when they start, so that those which outlive an epoch draw from
    where they were, which no resumed run could know. Each time that a worker begins to iterate,
    the next epoch begins.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.seed = 0
        self.epoch_id = 0
        """The epoch that the next iteration is of."""

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


def loader_generators(dataloader: Any) -> dict[str, RandomGenerator]:
    """The generators of torch, NumPy and Python in this process, by name.

    Of a loader and its samplers, from which the order of an epoch may come, and of its dataset.
    """
    found: dict[str, RandomGenerator] = {}
    for name, source in _all_sources(dataloader):
        if not any(source is other for other in found.values()):
            found[name] = source
    return found


def _all_sources(dataloader: Any) -> Iterator[tuple[str, RandomGenerator]]:
    for name, holder in [("loader", dataloader), *iter_samplers(dataloader)]:
        for attribute, value in getattr(holder, "__dict__", {}).items():
            if isinstance(value, GENERATORS):
                yield f"{name}.{attribute}", value
    yield from dataset_generators("dataset", getattr(dataloader, "dataset", None)).items()


def iter_samplers(dataloader: Any) -> Iterator[tuple[str, Any]]:
    """The samplers of a loader, those within others included, by name."""
    seen: list[Any] = []
    for place in ("sampler", "batch_sampler"):
        name, holder = place, getattr(dataloader, place, None)
        while holder is not None and not any(holder is other for other in seen):
            yield name, holder
            seen.append(holder)
            inner = "batch_sampler" if hasattr(holder, "batch_sampler") else "sampler"
            name, holder = f"{name}.{inner}", getattr(holder, inner, None)


def capture_generators(sources: Mapping[str, RandomGenerator]) -> dict[str, Any]:
    """Where each is in its stream, of plain values and tensors."""
    return dict(zip(sources, map(_plain, generator_states(sources)), strict=True))


def check_generators(state: Mapping[str, Any], sources: Iterable[str]) -> None:
    """Refuse the state of other generators than there are; raises ``StateError``."""
    if set(state) != set(sources):
        raise StateError(
            f"the data loader had the random generators {sorted(state)} when it was saved, and "
            f"has {sorted(sources)}; give it those that it had"
        )


def restore_generators(state: Mapping[str, Any], sources: Mapping[str, RandomGenerator]) -> None:
    """Have each draw from where :func:`capture_generators` was called."""
    set_generator_states(sources, [_numpy(state[name]) for name in sources])


def _plain(value: Any) -> Any:
    """With NumPy's arrays, of unsigned numbers, as signed tensors and a dtype."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.astype(np.int64)), "dtype": value.dtype.name}
    return value.item() if isinstance(value, np.generic) else value


def _numpy(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"array", "dtype"}:
            return value["array"].numpy().astype(value["dtype"])
        return {key: _numpy(item) for key, item in value.items()}
    return value
