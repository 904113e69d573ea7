"""How a run's data is ordered, and what its randomness is keyed by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch.utils.data import (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from robo_orchard_lab.pipeline.errors import PipelineConfigError

# --- order -----------------------------------------------------------------------------------


KeyedBy: TypeAlias = Literal["batch", "sample", "none"]


@dataclass(frozen=True, slots=True)
class DataOrder:
    """What the order of samples and the randomness of loading them follow from.

    Args:
        seed: from 0 to 2**64 - 1. None takes ``torch.initial_seed()`` of the first rank when the
            trainer is built, and the saved one when a run is resumed.
        keyed_by: what the randomness while loading belongs to. ``"batch"``: to (seed, epoch,
            batch). ``"sample"``: to (seed, epoch, sample), so that it does not depend on the batch
            size and the number of processes either; some 5 us a sample. ``"none"``: nothing is
            drawn, which saves the training process 10 to 25 us a batch; what is drawn all the same
            comes out of the model's stream, and is another after a resume.
        fast_forward: have a run that is resumed within an epoch of data without an index read all
            that was done, and drop it. Without it, the data must have saved its own state, and
            what that lacks is lost: Hugging Face's leaves out the buffer that a stream is shuffled
            in, torchdata's what workers draw at random.
        allow_other_batch_size: whether a run may be resumed within an epoch with another number
            of samples for each step of the whole job. The position in samples carries over.

    Raises:
        PipelineConfigError: a field has no such value.
    """

    seed: int | None = None
    keyed_by: KeyedBy = "batch"
    fast_forward: bool = False
    allow_other_batch_size: bool = False

    def __post_init__(self) -> None:
        seed = self.seed
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
            raise PipelineConfigError(
                f"DataOrder: seed must be an int from 0 to 2**64 - 1, or None, got {seed!r}"
            )
        if self.keyed_by not in get_args(KeyedBy):
            raise PipelineConfigError(
                f"DataOrder: keyed_by must be 'batch', 'sample' or 'none', got {self.keyed_by!r}"
            )
        for name in ("fast_forward", "allow_other_batch_size"):
            if type(getattr(self, name)) is not bool:
                raise PipelineConfigError(
                    f"DataOrder: {name} must be True or False, got {getattr(self, name)!r}"
                )


# --- index order -----------------------------------------------------------------------------
# The order of an epoch's samples, at once.


_KNOWN = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_INDICES = (range, list, tuple)  # which a loader takes for a sampler, too


class IndexOrder:
    """The dataset's indices in the order of an epoch.

    Args:
        places: which of the ``items`` comes when; these are the indices themselves where there
            are no items.
        items: what is chosen from.
    """

    def __init__(
        self, places: range | Sequence[Any] | torch.Tensor, items: Sequence[Any] | None = None
    ) -> None:
        self._places = places
        self._tensor = isinstance(places, torch.Tensor)
        self._items = items

    def __len__(self) -> int:
        return len(self._places)

    def indices(self, numbers: Sequence[int]) -> list[Any]:
        """Those at the given places, counted from 0."""
        if isinstance(numbers, range):
            return self.indices_between(numbers.start, numbers.stop)
        if isinstance(self._places, torch.Tensor):
            return self._of(self._places[list(numbers)].tolist())
        return self._of([self._places[number] for number in numbers])

    def indices_between(self, begin: int, end: int) -> list[Any]:
        """Those from one place on to another, exclusive."""
        part = self._places[begin:end]
        return self._of(part.tolist() if self._tensor else list(part))  # type: ignore[union-attr]  # a tensor's

    def _of(self, places: list[Any]) -> list[Any]:
        items = self._items
        return places if items is None else [items[place] for place in places]


def is_builtin(sampler: object) -> bool:
    """Whether :func:`sampler_order` gives a sampler's order; subclasses iterate themselves."""
    return type(sampler) in _KNOWN + _INDICES


def sampler_order(sampler: Any, keyed: torch.Generator) -> IndexOrder:
    """What iterating a known sampler to its end would give, drawn from its generator alike.

    One without a generator draws from ``keyed``.
    """
    if type(sampler) in _INDICES:
        return IndexOrder(sampler)
    if type(sampler) is SequentialSampler:
        return IndexOrder(range(len(sampler)))
    generator = keyed if sampler.generator is None else sampler.generator
    if type(sampler) is RandomSampler:
        return IndexOrder(_random_order(sampler, generator))
    if type(sampler) is SubsetRandomSampler:
        items = sampler.indices
        return IndexOrder(torch.randperm(len(items), generator=generator), items)
    return IndexOrder(
        torch.multinomial(
            sampler.weights, sampler.num_samples, sampler.replacement, generator=generator
        )
    )


def _random_order(sampler: RandomSampler, generator: torch.Generator) -> torch.Tensor:
    count, samples = len(sampler.data_source), sampler.num_samples
    if sampler.replacement:
        return torch.randint(count, (samples,), generator=generator)
    full, rest = divmod(samples, count)
    # It draws once more at its end, also where nothing is left to give.
    rounds = [torch.randperm(count, generator=generator) for _ in range(full + 1)]
    if full == 1 and rest == 0:
        return rounds[0]
    return torch.cat([*rounds[:-1], rounds[-1][:rest]])


# --- division --------------------------------------------------------------------------------
# Which samples of an epoch's order are a process's, in each step.


class StepSizes(NamedTuple):
    """How many samples a step has, or another weight of them."""

    local: float
    """Of this process; 0 where it takes part in the step with a filler."""
    total: float
    """Of all processes together."""


@dataclass(frozen=True, slots=True)
class StepPartition:
    """Steps that follow each other in the order, each cut into one batch for each process.

    A step has as many samples as one process with a batch that many times as large would take; the
    first process has the first of them. The last step, where samples are left for no full one, is
    cut as evenly as can be: nothing is repeated, and a process may have none of it. With
    ``drop_last`` there is no such step.
    """

    batch_size: int
    """Of one process."""
    drop_last: bool = False
    processes: int = 1
    rank: int = 0

    @property
    def samples_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.processes

    def steps(self, samples: int) -> int:
        """How many there are with so many samples; the same for all processes."""
        full, rest = divmod(samples, self.samples_per_step)
        return full + 1 if rest and not self.drop_last else full

    def sizes(self, samples: int, step_id: int) -> Iterator[StepSizes]:
        """How many samples the steps have, from one of them on."""
        steps = self.steps(samples)
        if step_id >= steps:
            return iter(())
        full = StepSizes(self.batch_size, self.samples_per_step)
        start = (steps - 1) * self.samples_per_step
        last = StepSizes(
            len(self.numbers(samples, start)), min(samples - start, self.samples_per_step)
        )
        return chain(repeat(full, steps - 1 - step_id), [last])

    def numbers(self, samples: int, start: int) -> range:
        """Those of this process in the step that begins with sample ``start``."""
        in_step = min(samples - start, self.samples_per_step)
        share = split_evenly(in_step, self.processes, self.rank)
        return range(start + share.start, start + share.stop)


def split_evenly(items: int, processes: int, rank: int) -> range:
    """Which of so many items are one process's, where each has as many as the others or one less.

    >>> [split_evenly(5, 3, rank) for rank in range(3)]
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    each, more = divmod(items, processes)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))
