"""Metric values: errors, records of a logging point, and accumulators between logging points.

An :class:`Accumulator` collects the values of one metric in constant memory. Numbers accumulate on
the host and tensors on their device, in double precision, so that publishing never waits for a
device. :func:`combine` then reduces the values of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from robo_orchard_lab.pipeline.state_schema import Real, Scalar, StateSchema


class MetricValueError(TypeError):
    """Error for a published value other than a single real number."""


@dataclass(frozen=True, slots=True)
class MetricValue:
    """Value of a metric, reduced over all ranks, with its step."""

    name: str
    value: float
    step: int
    """Number of steps of the run that were done when the value was measured."""


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """All metric values since the previous logging point.

    >>> record = MetricsRecord(0, 50, 50, (MetricValue("loss/total", 0.5, step=50),))
    >>> record.by_step()
    {50: {'loss/total': 0.5}}
    """

    epoch_id: int
    """Number of completed epochs."""
    global_step_id: int
    """Number of completed steps."""
    optimizer_step_id: int
    """Number of committed weight updates."""
    values: tuple[MetricValue, ...]
    """Values in step order; a name may occur for several steps."""
    partial: bool = False
    """True if the run ended before the next logging point. A resumed run logs these values again,
    in the record of its next logging point."""

    def by_step(self) -> dict[int, dict[str, float]]:
        """Group the values by step, earliest step first."""
        steps: dict[int, dict[str, float]] = {}
        for value in self.values:
            steps.setdefault(value.step, {})[value.name] = value.value
        return dict(sorted(steps.items()))


def number_text(value: float) -> str:
    """Format a metric value in few characters.

    >>> number_text(0.42314), number_text(123.456), number_text(3.2e-4)
    ('0.4231', '123.46', '3.200e-04')
    """
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.3e}"


Reduction: TypeAlias = Literal["mean", "sum", "max", "min", "last"]
"""Reduction of a metric's values, over the steps between two logging points and over the ranks."""
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Number: TypeAlias = float | torch.Tensor
RankValues: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""One rank's :meth:`Accumulator.numbers` and, copied to the host, :meth:`Accumulator.tensors`."""


def check_scalar(name: str, value: Any, role: str = "") -> Number:
    """Return a single real number, or a real tensor with a single element, unchanged.

    Raises:
        MetricValueError: with the name of the metric and the type or shape that was found.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise MetricValueError(f"{role}metric {name!r} must be real, got {value.dtype}")
        if value.numel() != 1:
            raise MetricValueError(
                f"{role}metric {name!r} must be a single number, got a tensor "
                f"of shape {tuple(value.shape)}; reduce it first"
            )
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (float, int, np.number, np.bool_)) and not np.iscomplexobj(value):
        return float(value)
    raise MetricValueError(f"{role}metric {name!r} must be a number, got {type(value).__name__}")


def host_value(tensor: torch.Tensor) -> float | None:
    """Return the value of a scalar CPU tensor, which is read without waiting; None for others.

    Costs 0.2 us; adding the tensor to another one costs 2.3 us.
    """
    if not tensor.is_cpu:
        return None
    value: Any = tensor.tolist()  # item() warns of a tensor with a graph
    return None if isinstance(value, list) else float(value)


class WeightedSum:
    """Sum of weighted values and sum of their weights, in double precision.

    Numbers and CPU tensors add up on the host, other tensors in place on their device, without a
    device sync. MPS has no double precision; tensors there add up in float32.
    """

    __slots__ = ("host", "host_weight", "tensor", "tensor_weight")

    def __init__(self) -> None:
        self.host = 0.0
        self.host_weight = 0.0
        self.tensor: torch.Tensor | None = None
        self.tensor_weight: torch.Tensor | None = None

    def add(self, value: Number, weight: Number = 1.0) -> None:
        """Add a number, or a single-element tensor of any dtype; a graph is detached."""
        if isinstance(value, torch.Tensor) and self.tensor is None:
            number = host_value(value)
            value = value if number is None else number
        if not isinstance(value, torch.Tensor):
            if isinstance(weight, torch.Tensor):
                value = _zero(weight.device).fill_(value)
            else:
                self.host += value * weight
                self.host_weight += weight
                return
        if self.tensor is None:
            self.tensor = _zero(value.device)
        value = value.detach() if value.dim() == 0 else value.detach().reshape(())
        if not isinstance(weight, torch.Tensor):
            self.tensor.add_(value, alpha=weight)
            self.host_weight += weight
            return
        if self.tensor_weight is None:
            self.tensor_weight = _zero(value.device)
        weight = weight.detach().reshape(()).to(self.tensor_weight)
        self.tensor.add_(value * weight)
        self.tensor_weight.add_(weight)

    def scale(self, factor: float) -> None:
        """Multiply the sum and the weight by ``factor``."""
        self.host *= factor
        self.host_weight *= factor
        for tensor in (self.tensor, self.tensor_weight):
            if tensor is not None:
                tensor.mul_(factor)

    def merge(self, other: WeightedSum) -> None:
        """Add another sum."""
        self.host += other.host
        self.host_weight += other.host_weight
        if other.tensor is not None:
            self.tensor = _zero(other.tensor.device) if self.tensor is None else self.tensor
            self.tensor.add_(other.tensor)
        if other.tensor_weight is not None:
            if self.tensor_weight is None:
                self.tensor_weight = _zero(other.tensor_weight.device)
            self.tensor_weight.add_(other.tensor_weight)

    @property
    def is_empty(self) -> bool:
        """Return True if no value was added."""
        return self.host_weight == 0.0 and self.tensor is None

    def to_tensor(self, device: torch.device) -> torch.Tensor:
        """Return a tensor of shape (2,) on ``device``: the sum and the weight."""
        parts = (self.tensor, self.host), (self.tensor_weight, self.host_weight)
        zero = _zero(device)
        return torch.stack([(zero if t is None else t.to(zero)) + number for t, number in parts])

    schema = StateSchema(
        host=Real, host_weight=Real, tensor=Scalar | None, tensor_weight=Scalar | None
    )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums; tensors are copies."""
        tensors = {"tensor": self.tensor, "tensor_weight": self.tensor_weight}
        return {
            "host": self.host,
            "host_weight": self.host_weight,
            **{name: None if t is None else t.clone() for name, t in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Restore the sums, with tensors on ``device``; None keeps the device of each tensor."""
        self.host, self.host_weight = state["host"], state["host_weight"]
        for name in ("tensor", "tensor_weight"):
            value = state[name]
            setattr(self, name, None if value is None else value.to(device=device, copy=True))


class Accumulator:
    """Values of a metric since the last logging point, in constant memory.

    ``mean`` and ``sum`` accumulate a :class:`WeightedSum`. ``max``, ``min`` and ``last`` keep a
    number on the host and a 0-dim tensor on the device.
    """

    __slots__ = ("_host", "_sum", "_tensor", "is_weighted", "latest", "reduce", "step")

    def __init__(self, reduce: Reduction) -> None:
        self.reduce = reduce
        self.step = 0
        """Step of the latest value."""
        self.latest: Number = math.nan
        """Latest value, as published."""
        self.is_weighted = False
        """True if values have weights, such as numbers of samples. Without weights, each rank
        counts the same."""
        self._sum = WeightedSum() if reduce in ("mean", "sum") else None
        self._host: float | None = None
        self._tensor: torch.Tensor | None = None

    def add(self, value: Number, weight: Number = 1.0) -> None:
        """Accumulate a value."""
        if self._sum is not None:
            self._sum.add(value, weight)
        elif isinstance(value, torch.Tensor):
            value = value.detach().reshape(()).to(_zero(value.device), copy=True)
            if self.reduce == "last":
                self._host, self._tensor = None, value
            elif self._tensor is None:
                self._tensor = value
            else:
                pick = torch.maximum if self.reduce == "max" else torch.minimum
                pick(self._tensor, value, out=self._tensor)
        elif self.reduce == "last":
            self._host, self._tensor = float(value), None
        else:
            known = [] if self._host is None else [self._host]
            self._host = _extreme(self.reduce, [*known, float(value)])

    def add_sum(self, total: WeightedSum) -> None:
        """Accumulate a weighted sum; the caller must not use the sum afterwards."""
        assert self._sum is not None, "only for mean and sum"
        if self._sum.is_empty:
            self._sum = total
        else:
            self._sum.merge(total)

    def merge(self, other: Accumulator) -> None:
        """Accumulate the values of the same metric on a later rank."""
        if self._sum is not None and other._sum is not None:
            self._sum.merge(other._sum)
        elif self.reduce != "last":  # the earlier rank wins
            for value in (other._host, other._tensor):
                if value is not None:
                    self.add(value)

    def rescale(self, factor: float) -> None:
        """Adapt to a world size ``factor`` times as large; relevant only for unweighted means."""
        if self._sum is not None and self.reduce == "mean" and not self.is_weighted:
            self._sum.scale(factor)

    def numbers(self) -> list[float]:
        """Return the values on the host."""
        if self._sum is not None:
            return [self._sum.host, self._sum.host_weight]
        return [] if self._host is None else [self._host]

    def tensors(self) -> list[torch.Tensor]:
        """Return the values on the device: 0-dim tensors of equal dtype."""
        total = self._sum
        if total is not None and total.tensor is None and total.tensor_weight is None:
            return []
        found = [self._tensor] if total is None else [total.tensor, total.tensor_weight]
        return [tensor for tensor in found if tensor is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the accumulated values; tensors are copies."""
        if self._sum is not None:
            return self._sum.state_dict()
        tensor = self._tensor
        return {"host": self._host, "tensor": None if tensor is None else tensor.clone()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the values, with tensors on ``device``."""
        if self._sum is not None:
            self._sum.load_state_dict(state, device)
        else:
            self._host, tensor = state["host"], state["tensor"]
            self._tensor = None if tensor is None else tensor.to(device=device, copy=True)


def combine(reduce: str, ranks: Sequence[RankValues]) -> float:
    """Reduce the values of the publishing ranks, in rank order; NaN for a mean without weight."""
    if reduce not in ("mean", "sum"):
        return combine_values(reduce, [value for rank in ranks for part in rank for value in part])
    if len(ranks) == 1 and not ranks[0][1]:  # one process and no device: a fifth of the time
        total, weight = ranks[0][0]
        return total if reduce == "sum" else total / weight if weight else math.nan
    values = [n[0] for n, _ in ranks] + [t[0] for _, t in ranks if t]
    weights = [n[1] for n, _ in ranks] + [t[1] for _, t in ranks if len(t) == 2]
    return combine_values(reduce, values, weights)


def combine_values(reduce: str, values: Sequence[float], weights: Sequence[float] = ()) -> float:
    """Reduce values, in rank order; means and sums from sums of values and sums of weights."""
    if reduce == "last":
        return values[0]
    if reduce in ("max", "min"):
        return _extreme(reduce, values)
    total = _fsum(values)
    if reduce == "sum":
        return total
    weight = _fsum(weights)
    return total / weight if weight else math.nan


def _extreme(reduce: str, values: Sequence[float]) -> float:
    """Return the largest or smallest value; NaN if any value is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values) if reduce == "max" else min(values)


def _zero(device: torch.device) -> torch.Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


def _fsum(values: Sequence[float]) -> float:
    # math.fsum raises on inf - inf and on overflow; the plain sum returns nan and inf.
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)
