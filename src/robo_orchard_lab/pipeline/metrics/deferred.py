"""Metrics whose values follow from tensors that all ranks have a part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics.exchange import Exchange, Parcel

StateReduction: TypeAlias = str | Callable[[torch.Tensor], torch.Tensor] | None
"""``sum``, ``mean``, ``max``, ``min``: elementwise over the ranks; ``cat``: along the first
dimension; a function of the ranks' tensors, stacked; None: the ranks' tensors, stacked."""


class DeferredMetrics(Protocol):
    """Tensors on the device, and the metrics that follow from them once they are reduced.

    Every rank has one of the same kind and the same names.
    """

    def names(self) -> Sequence[str]:
        """The names of the values, known ahead."""
        ...

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        """This rank's tensors, and how they are reduced over the ranks."""
        ...

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        """The values by name, of the reduced tensors, which lie on the CPU."""
        ...


def resolve(deferred: DeferredMetrics, accelerator: Any = None) -> dict[str, float]:
    """The values, read at once: one transfer and, with several processes, one collective."""
    states = deferred.states()
    parcel = Parcel("", (), [tensor for tensor, _ in states])
    ranks = [row.tensors for row in Exchange()(parcel, accelerator)]
    return dict(deferred.values(reduce_states(ranks, [reduce for _, reduce in states])))


def reduce_states(
    ranks: Sequence[Sequence[torch.Tensor]], reductions: Sequence[StateReduction]
) -> list[torch.Tensor]:
    """The tensors of all ranks as one of each."""
    return [
        _reduced([tensors[index] for tensors in ranks], reduce)
        for index, reduce in enumerate(reductions)
    ]


def _reduced(tensors: list[torch.Tensor], reduce: StateReduction) -> torch.Tensor:
    if reduce == "cat":
        return torch.cat(
            [tensor.reshape(-1) if tensor.dim() == 0 else tensor for tensor in tensors]
        )
    if len(tensors) == 1 and isinstance(reduce, str):
        return tensors[0]
    stacked = torch.stack(tensors)
    if reduce is None:
        return stacked
    if callable(reduce):
        return reduce(stacked)
    if reduce == "sum":
        return stacked.sum(0, dtype=stacked.dtype)
    if reduce == "mean":
        return stacked.mean(0)
    return stacked.amax(0) if reduce == "max" else stacked.amin(0)
