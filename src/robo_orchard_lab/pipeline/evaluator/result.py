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
        total, weight = loss_sum.tensor, loss_sum.tensor_weight
        zero = torch.zeros((), dtype=_sum_dtype(device), device=device)
        self._on_host = torch.tensor([loss_sum.host, loss_sum.host_weight], dtype=torch.float64)
        self._on_device = torch.stack([zero if t is None else t.to(zero) for t in (total, weight)])

    def names(self) -> Sequence[str]:
        return self._names

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(self._on_host, "sum"), (self._on_device, "sum")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        total, weight = (reduced[0] + reduced[1]).tolist()
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


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
