"""The order of an epoch's samples, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

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


def is_known(sampler: object) -> bool:
    """Whether :func:`order_of` gives a sampler's order; those of derived classes are theirs."""
    return type(sampler) in _KNOWN + _INDICES


def order_of(sampler: Any, keyed: torch.Generator) -> IndexOrder:
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
