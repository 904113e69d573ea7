"""What samplers of one's own keep from one epoch to the next, as state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler

from robo_orchard_lab.pipeline.data.index_order import is_known
from robo_orchard_lab.pipeline.data.random_sources import samplers_of

_SCALARS = (bool, int, float, str, type(None))
_MOST_NUMBERS = 2_000_000  # of a list or an array; a state is saved with every checkpoint


class SamplerState:
    """The attributes of samplers that change as they are used, such as a count of epochs.

    Numbers, texts, tensors, arrays, and lists of numbers or of batches of indices, of samplers
    other than torch's own. What is as it was when the loader was made is no state: it is the
    configuration, which may be changed.

    Args:
        dataloader: the loader that has the samplers, just made.
    """

    def __init__(self, dataloader: Any) -> None:
        self._samplers = {
            name: sampler
            for name, sampler in samplers_of(dataloader)
            if type(sampler) is not BatchSampler and not is_known(sampler)
        }
        self._first = dict(self._attributes())

    def capture(self) -> dict[str, Any]:
        """What has changed, by the names of samplers and their attributes."""
        return {
            name: value
            for name, value in self._attributes()
            if name not in self._first or not _equal(value, self._first[name])
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have the samplers be as they were captured."""
        for name, value in state.items():
            place, _, attribute = name.rpartition(".")
            sampler = self._samplers.get(place)
            if sampler is not None:
                _put(sampler, attribute, value)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for place, sampler in self._samplers.items():
            for attribute, value in list(getattr(sampler, "__dict__", {}).items()):
                plain = _plain(value)
                if plain is not None:
                    yield f"{place}.{attribute}", plain[0]


def _plain(value: Any) -> tuple[Any] | None:
    """A copy that can be saved; None of what is no state."""
    if type(value) in _SCALARS:
        return (value,)
    if isinstance(value, torch.Tensor):
        return (value.detach().clone(),) if value.numel() <= _MOST_NUMBERS else None
    if isinstance(value, np.ndarray) and value.dtype.kind in "bif":
        return (torch.from_numpy(value.copy()),) if value.size <= _MOST_NUMBERS else None
    if type(value) is list and value and len(value) <= _MOST_NUMBERS:
        kind = type(value[0])
        if kind in (int, float) and all(type(item) is kind for item in value):
            return (torch.tensor(value, dtype=torch.int64 if kind is int else torch.float64),)
        if kind is list and sum(map(len, value)) <= _MOST_NUMBERS:
            return _plain_batches(value)
    return None


def _plain_batches(batches: list[Any]) -> tuple[Any] | None:
    flat = [index for batch in batches if type(batch) is list for index in batch]
    if len(flat) != sum(map(len, batches)) or not all(type(index) is int for index in flat):
        return None
    lengths = torch.tensor([len(batch) for batch in batches])
    return ({"flat": torch.tensor(flat, dtype=torch.int64), "lengths": lengths},)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _put(sampler: Any, attribute: str, value: Any) -> None:
    """Within what is there where it can be, since others may hold it, too."""
    now = getattr(sampler, attribute, None)
    if isinstance(value, dict):
        parts = value["flat"].split(value["lengths"].tolist())
        value = [part.tolist() for part in parts]
        if isinstance(now, list):
            now[:] = value
        else:
            setattr(sampler, attribute, value)
    elif isinstance(value, torch.Tensor) and isinstance(now, list):
        now[:] = value.tolist()
    elif isinstance(value, torch.Tensor) and isinstance(now, np.ndarray):
        array = value.numpy()
        if now.shape == array.shape and now.dtype == array.dtype:
            now[...] = array
        else:
            setattr(sampler, attribute, array.copy())
    else:
        setattr(sampler, attribute, value)
