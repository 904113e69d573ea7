"""The random generators that a loader, its samplers and its dataset keep, as state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.data.kept_generators import (
    GENERATORS,
    RandomSource,
    kept_generators,
    set_states,
    states_of,
)
from robo_orchard_lab.pipeline.errors import StateError


def random_sources_of(dataloader: Any) -> dict[str, RandomSource]:
    """The generators of torch, NumPy and Python in this process, by name.

    Of a loader and its samplers, from which the order of an epoch may come, and of its dataset.
    """
    found: dict[str, RandomSource] = {}
    for name, source in _all_sources(dataloader):
        if not any(source is other for other in found.values()):
            found[name] = source
    return found


def _all_sources(dataloader: Any) -> Iterator[tuple[str, RandomSource]]:
    for name, holder in [("loader", dataloader), *samplers_of(dataloader)]:
        for attribute, value in getattr(holder, "__dict__", {}).items():
            if isinstance(value, GENERATORS):
                yield f"{name}.{attribute}", value
    yield from kept_generators("dataset", getattr(dataloader, "dataset", None)).items()


def samplers_of(dataloader: Any) -> Iterator[tuple[str, Any]]:
    """The samplers of a loader, those within others included, by name."""
    seen: list[Any] = []
    for place in ("sampler", "batch_sampler"):
        name, holder = place, getattr(dataloader, place, None)
        while holder is not None and not any(holder is other for other in seen):
            yield name, holder
            seen.append(holder)
            inner = "batch_sampler" if hasattr(holder, "batch_sampler") else "sampler"
            name, holder = f"{name}.{inner}", getattr(holder, inner, None)


def capture_sources(sources: Mapping[str, RandomSource]) -> dict[str, Any]:
    """Where each is in its stream, of plain values and tensors."""
    return dict(zip(sources, map(_plain, states_of(sources)), strict=True))


def check_sources(state: Mapping[str, Any], sources: Iterable[str]) -> None:
    """Refuse the state of other generators than there are; raises ``StateError``."""
    if set(state) != set(sources):
        raise StateError(
            f"the data loader had the random generators {sorted(state)} when it was saved, and "
            f"has {sorted(sources)}; give it those that it had"
        )


def restore_sources(state: Mapping[str, Any], sources: Mapping[str, RandomSource]) -> None:
    """Have each draw from where :func:`capture_sources` was called."""
    set_states(sources, [_numpy(state[name]) for name in sources])


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
