"""What an evaluation has summed up, to be reduced over the ranks and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from robo_orchard_lab.pipeline.metrics import DeferredMetrics, WeightedSum
from robo_orchard_lab.pipeline.metrics.deferred import StateReduction


class MeanLoss:
    """A mean over the samples of all ranks; no value where no rank has any.

    A :class:`DeferredMetrics`.
    """

    def __init__(self, name: str, loss_sum: WeightedSum, device: torch.device) -> None:
        self._name = name
        self._names = [name]
        self._total = loss_sum.on_device(device)

    def names(self) -> Sequence[str]:
        return self._names

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(self._total, "sum")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        total, weight = reduced[0].tolist()
        values = {self._name: total / weight} if weight else {}
        self._names = list(values)
        return values


class JoinedMetrics:
    """Several deferred metrics as one."""

    def __init__(self, parts: Sequence[DeferredMetrics]) -> None:
        self._parts = parts

    def names(self) -> Sequence[str]:
        return [name for part in self._parts for name in part.names()]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [state for part in self._parts for state in part.states()]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        values: dict[str, float] = {}
        begin = 0
        for part in self._parts:
            end = begin + len(part.states())
            values.update(part.values(reduced[begin:end]))
            begin = end
        return values
