"""Loading of a batch with seeded RNGs, in a worker or in the training process.

- :func:`epoch_seed`, :func:`indexed_seed`, :func:`seed_rng`: seeds
- :class:`RngIsolation`, :class:`PersistentRng`: contexts that restore the process's global RNGs
- :func:`seeded_tasks`: requests to load the batches of an epoch, with their seeds
- :class:`Fetcher`: dataset of batches, which replaces the user's dataset in the rebuilt loader
- :class:`ReseededDataset`: an iterable dataset whose persistent workers are reseeded every epoch
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_uint32
from enum import IntEnum
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from robo_orchard_lab.pipeline.data.order import KeyedBy
from robo_orchard_lab.pipeline.data.random_generators import (
    RandomGenerator,
    dataset_generators,
    generator_states,
    set_generator_states,
)
from robo_orchard_lab.pipeline.data.slots import PackedBatches, Slot, SlotWriter


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


class Task(NamedTuple):
    """Request to load a batch."""

    epoch_id: int
    batch_id: int
    """Number of the batch in the epoch, over all processes, from 0."""
    indices: Any
    """List of dataset indices, or one index of a complete batch."""
    seed: int | None
    """Seed of the batch, or of ``collate_fn`` if samples have their own; None disables seeding."""
    sample_seeds: list[int] | None
    """Seed of each sample with ``keyed_by="sample"``."""


class TaskGroup(NamedTuple):
    """Request to a worker to load some batches."""

    tasks: list[Task]
    slot: Slot


class LoadedGroup(NamedTuple):
    """Result of a :class:`TaskGroup`."""

    packed: PackedBatches
    failed: tuple[Task, str] | None
    """Task after the batches that failed, and the traceback."""
    seconds: float
    """Time to load a batch."""


def seeded_tasks(
    batches: Iterator[tuple[int, Sequence[int], Any, Any]],
    seed: int,
    epoch_id: int,
    keyed_by: KeyedBy,
) -> Iterator[Task]:
    """Return the tasks of an epoch's batches, each of number, sample numbers, indices and sizes."""
    if keyed_by == "none":
        return (Task(epoch_id, batch[0], batch[2], None, None) for batch in batches)
    key = epoch_seed(seed, epoch_id, RngStream.LOADING)
    if keyed_by == "batch":
        return (
            Task(epoch_id, batch_id, indices, indexed_seed(key, batch_id), None)
            for batch_id, _, indices, _ in batches
        )
    collating = epoch_seed(seed, epoch_id, RngStream.COLLATING)
    return (
        Task(
            epoch_id,
            batch_id,
            indices,
            indexed_seed(collating, numbers[0]),
            [indexed_seed(key, number) for number in numbers],
        )
        for batch_id, numbers, indices, _ in batches
    )


class Fetcher(Dataset[Any]):
    """Dataset of batches, indexed by :class:`Task`, from the user's dataset and ``collate_fn``.

    Indexed by :class:`TaskGroup`, it returns a :class:`LoadedGroup`.

    In the training process, the RNGs and the dataset's generators are restored afterwards. A task
    has a list of indices, one for each sample, if ``batched``.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], batched: bool) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batched = batched
        self.epoch_id: int | None = None
        """Epoch of the dataset's last ``set_epoch``."""
        self._isolation = RngIsolation()
        self._slots = SlotWriter()
        self._searched_epoch: int | None = None
        self._generators: dict[str, RandomGenerator] = {}
        """Generators of the dataset and of ``collate_fn``, found at the first task of an epoch."""

    def __getitem__(self, task: Task | TaskGroup) -> Any:
        if isinstance(task, TaskGroup):
            return self._load_group(task)
        in_worker = get_worker_info() is not None
        if not in_worker and task.seed is None:
            return self._load(task)
        if task.epoch_id != self._searched_epoch:
            self._begin_epoch(task.epoch_id)
        if in_worker:
            return self._load(task)
        with self._isolation:
            if not self._generators:
                return self._load(task)
            states = generator_states(self._generators)
            try:
                return self._load(task)
            finally:
                set_generator_states(self._generators, states)

    def _load_group(self, group: TaskGroup) -> LoadedGroup:
        batches: list[Any] = []
        failed = None
        began_at = time.perf_counter()
        for task in group.tasks:
            try:
                batches.append(self[task])
            except Exception:  # of the dataset; the task alone raises it again, in its place
                if not batches:
                    raise
                failed = task, traceback.format_exc()
                break
        seconds = (time.perf_counter() - began_at) / len(batches)
        return LoadedGroup(self._slots.pack(batches, group.slot), failed, seconds)

    def _load(self, task: Task) -> Any:
        dataset, indices = self.dataset, task.indices
        try:
            if task.sample_seeds is not None:
                samples = []
                for index, seed in zip(
                    indices if self.batched else [indices], task.sample_seeds, strict=True
                ):
                    self._seed(seed)
                    samples.append(dataset[index])
                samples = samples if self.batched else samples[0]
                self._seed(task.seed)
            else:
                self._seed(task.seed)
                if not self.batched:
                    samples = dataset[indices]
                elif getattr(dataset, "__getitems__", None):
                    samples = dataset.__getitems__(indices)
                else:
                    samples = [dataset[index] for index in indices]
            return self.collate_fn(samples)
        except Exception as error:
            error.add_note(
                f"while loading batch {task.batch_id + 1} of epoch {task.epoch_id + 1}, "
                f"of the dataset's indices {indices!r:.200}"
            )
            raise

    def _seed(self, seed: int | None) -> None:
        if seed is not None:
            seed_rng(seed)
            if self._generators:
                seed_generators(self._generators, seed)

    def _begin_epoch(self, epoch_id: int) -> None:
        if epoch_id != self.epoch_id:
            self.epoch_id = epoch_id
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch_id)
        self._searched_epoch = epoch_id
        self._generators = dataset_generators("", (self.dataset, self.collate_fn))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_searched_epoch": None, "_generators": {}}


def identity(batch: Any) -> Any:
    """Return a batch unchanged, as a ``collate_fn``."""
    return batch


def is_deterministic(dataset: Any, collate_fn: Any) -> bool:
    """Return True if loading is known to draw no random numbers and needs no seeds."""
    return collate_fn in (default_collate, default_convert) and _holds_its_items(dataset)


def _holds_its_items(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _holds_its_items(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_holds_its_items(part) for part in dataset.datasets)
    return type(dataset) in (TensorDataset, list, tuple)


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
