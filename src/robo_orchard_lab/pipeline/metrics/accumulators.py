"""What was published under one name since the last logging point, in constant memory."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import numpy as np
import torch

# --- errors ----------------------------------------------------------------------------------
# What the board refuses.


class MetricValueError(TypeError):
    """What was published is no single number; the message names the metric."""


class UnknownMetricError(LookupError):
    """A name that nobody has published; the message lists those that were."""

    def __init__(self, name: str, published: Iterable[str], who: str = "", hint: str = "") -> None:
        published = sorted(published)
        near = difflib.get_close_matches(name, published, n=1)
        super().__init__(
            f"no metric {name!r} was published"
            + (f", which {who} waits for" if who else "")
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Published: {', '.join(published) or 'none'}"
            + (f". {hint}" if hint else "")
        )


# --- record ----------------------------------------------------------------------------------
# What a logging point finds.


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One number, of all ranks, and the step that it belongs to."""

    name: str
    value: float
    step: int
    """How many steps of the run were done when it was measured."""


def number_text(value: float) -> str:
    """A value in few characters: four decimals as long as these say something.

    >>> number_text(0.42314), number_text(123.456), number_text(3.2e-4)
    ('0.4231', '123.46', '3.200e-04')
    """
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.3e}"


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """Everything that was found since the logging point before.

    >>> record = MetricsRecord(0, 50, 50, (MetricValue("loss/total", 0.5, step=50),))
    >>> record.by_step()
    {50: {'loss/total': 0.5}}
    """

    epoch_id: int
    """How many epochs are done."""
    global_step_id: int
    """How many steps are done."""
    optimizer_step_id: int
    """How many updates of the weights are committed."""
    values: tuple[MetricValue, ...]
    """In the order of their steps; a name may be there more than once, for several steps."""
    partial: bool = False
    """Whether the run has ended ahead of the next logging point. A run that goes on from there
    has these values again, in the record that its next logging point makes."""

    def by_step(self) -> dict[int, dict[str, float]]:
        """The values by the step that they belong to, the earliest first."""
        steps: dict[int, dict[str, float]] = {}
        for value in self.values:
            steps.setdefault(value.step, {})[value.name] = value.value
        return dict(sorted(steps.items()))


Reduction: TypeAlias = Literal["mean", "sum", "max", "min", "last"]
"""How the values of one name become one: over the window, and over the ranks."""
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Number: TypeAlias = float | torch.Tensor
Parts: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""One rank's numbers and, once they were read, tensors, as :meth:`Window.numbers` and
:meth:`Window.tensors` gave them."""


class WeightedSum:
    """A sum of weighted values and the sum of their weights, in double precision.

    Numbers add up on the host and tensors on their device, in place; nothing is read back. On
    devices without double precision (MPS) tensors add up in single.
    """

    __slots__ = ("host", "host_weight", "tensor", "tensor_weight")

    def __init__(self) -> None:
        self.host = 0.0
        self.host_weight = 0.0
        self.tensor: torch.Tensor | None = None
        self.tensor_weight: torch.Tensor | None = None

    def add(self, value: Number, weight: Number = 1.0) -> None:
        """Add a number, or a tensor of one element of any dtype, which may carry a graph."""
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
        """Have all that was added weigh so many times as much."""
        self.host *= factor
        self.host_weight *= factor
        for tensor in (self.tensor, self.tensor_weight):
            if tensor is not None:
                tensor.mul_(factor)

    def merge(self, other: WeightedSum) -> None:
        """Add what another one has added up."""
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
    def empty(self) -> bool:
        """Whether nothing was added."""
        return self.host_weight == 0.0 and self.tensor is None

    def on_device(self, device: torch.device) -> torch.Tensor:
        """The sum and that of the weights, all that was added, as a tensor of two on a device."""
        parts = (self.tensor, self.host), (self.tensor_weight, self.host_weight)
        zero = _zero(device)
        return torch.stack([(zero if t is None else t.to(zero)) + number for t, number in parts])

    def state_dict(self) -> dict[str, Any]:
        """All that was added up; tensors as copies."""
        tensors = {"tensor": self.tensor, "tensor_weight": self.tensor_weight}
        return {
            "host": self.host,
            "host_weight": self.host_weight,
            **{name: None if t is None else t.clone() for name, t in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from a state, with its tensors on ``device``; None leaves them where they are."""
        self.host, self.host_weight = state["host"], state["host_weight"]
        for name in ("tensor", "tensor_weight"):
            value = state[name]
            setattr(self, name, None if value is None else value.to(device=device, copy=True))


class Window(ABC):
    """The values of one name since the last logging point."""

    __slots__ = ("latest", "step", "weighted")

    reduce: ClassVar[Reduction]

    def __init__(self) -> None:
        self.step = 0
        """The step that the latest value belongs to."""
        self.latest: Number = math.nan
        """The latest value, as it was published."""
        self.weighted = False
        """Whether values came with weights, such as numbers of samples; else each rank's count as
        much as those of another one."""

    @abstractmethod
    def add(self, value: Number, weight: Number) -> None:
        """Take one more value in."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what the same name has had on a later rank."""

    @abstractmethod
    def spread(self, factor: float) -> None:
        """Go on among so many times as many ranks, each of which publishes."""

    @abstractmethod
    def numbers(self) -> list[float]:
        """What is on the host."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """What is on the device: tensors of no dimensions, of one dtype."""

    @staticmethod
    @abstractmethod
    def combine(ranks: Sequence[Parts]) -> float:
        """One value of the parts of the ranks that have some; NaN where these have no weight."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was taken in."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from a state, with its tensors on ``device``; None leaves them where they are."""

    def copy(self) -> Self:
        """Another one, that goes on by itself."""
        twin = type(self)()
        twin.step, twin.latest, twin.weighted = self.step, self.latest, self.weighted
        twin.load_state_dict(self.state_dict(), None)
        return twin


class MeanWindow(Window):
    """The weighted mean."""

    __slots__ = ("_sum",)

    reduce: ClassVar[Reduction] = "mean"

    def __init__(self) -> None:
        super().__init__()
        self._sum = WeightedSum()

    def add(self, value: Number, weight: Number) -> None:
        self._sum.add(value, weight)

    def take_over(self, total: WeightedSum) -> None:
        """Take a whole sum in, which is no longer the caller's."""
        if self._sum.empty:
            self._sum = total
        else:
            self._sum.merge(total)

    def merge(self, other: Self) -> None:
        self._sum.merge(other._sum)

    def spread(self, factor: float) -> None:
        if not self.weighted:
            self._sum.scale(factor)

    def numbers(self) -> list[float]:
        return [self._sum.host, self._sum.host_weight]

    def tensors(self) -> list[torch.Tensor]:
        parts = (self._sum.tensor, self._sum.tensor_weight)
        return [part for part in parts if part is not None]

    @staticmethod
    def combine(ranks: Sequence[Parts]) -> float:
        total = _fsum([n[0] for n, _ in ranks] + [t[0] for _, t in ranks if t])
        weight = _fsum([n[1] for n, _ in ranks] + [t[1] for _, t in ranks if len(t) == 2])
        return total / weight if weight else math.nan

    def state_dict(self) -> dict[str, Any]:
        return self._sum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        self._sum.load_state_dict(state, device)


class _SumWindow(MeanWindow):
    __slots__ = ()

    reduce: ClassVar[Reduction] = "sum"

    def spread(self, factor: float) -> None:
        """Nothing: a sum stays what it is."""

    @staticmethod
    def combine(ranks: Sequence[Parts]) -> float:
        return _fsum([n[0] for n, _ in ranks] + [t[0] for _, t in ranks if t])


class _SlotWindow(Window):
    """A window that keeps one value of the host and one of the device."""

    __slots__ = ("_host", "_tensor")

    def __init__(self) -> None:
        super().__init__()
        self._host: float | None = None
        self._tensor: torch.Tensor | None = None

    def spread(self, factor: float) -> None:
        """Nothing: how many ranks publish makes no difference."""

    def numbers(self) -> list[float]:
        return [] if self._host is None else [self._host]

    def tensors(self) -> list[torch.Tensor]:
        return [] if self._tensor is None else [self._tensor]

    def state_dict(self) -> dict[str, Any]:
        tensor = self._tensor
        return {"host": self._host, "tensor": None if tensor is None else tensor.clone()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        self._host, tensor = state["host"], state["tensor"]
        self._tensor = None if tensor is None else tensor.to(device=device, copy=True)


class _MaxWindow(_SlotWindow):
    """NaN, once there, stays."""

    __slots__ = ()

    reduce: ClassVar[Reduction] = "max"
    _sign = 1.0

    def add(self, value: Number, weight: Number) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().reshape(()).to(_zero(value.device))
            if self._tensor is None:
                self._tensor = value.clone()
            else:
                pick = torch.maximum if self._sign > 0 else torch.minimum
                pick(self._tensor, value, out=self._tensor)
        elif self._host is None:
            self._host = float(value)
        else:
            self._host = _extreme([self._host, float(value)], self._sign)

    def merge(self, other: Self) -> None:
        for value in (other._host, other._tensor):
            if value is not None:
                self.add(value, 1.0)

    @staticmethod
    def combine(ranks: Sequence[Parts]) -> float:
        return _extreme([x for parts in ranks for part in parts for x in part], 1.0)


class _MinWindow(_MaxWindow):
    __slots__ = ()

    reduce: ClassVar[Reduction] = "min"
    _sign = -1.0

    @staticmethod
    def combine(ranks: Sequence[Parts]) -> float:
        return _extreme([x for parts in ranks for part in parts for x in part], -1.0)


class _LastWindow(_SlotWindow):
    """Of several ranks' values, the one of the first rank that has any."""

    __slots__ = ()

    reduce: ClassVar[Reduction] = "last"

    def add(self, value: Number, weight: Number) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().reshape(())
            self._tensor = _zero(value.device).copy_(value)
            self._host = None
        else:
            self._host, self._tensor = float(value), None

    def merge(self, other: Self) -> None:
        """What is here came from an earlier rank, and stays."""

    @staticmethod
    def combine(ranks: Sequence[Parts]) -> float:
        return next(x for parts in ranks for part in parts for x in part)


WINDOWS: Mapping[str, type[Window]] = {
    kind.reduce: kind for kind in (MeanWindow, _SumWindow, _MaxWindow, _MinWindow, _LastWindow)
}


def check_scalar(name: str, value: Any, role: str = "") -> Number:
    """The value if it is one real number on any device.

    Raises:
        MetricValueError: it is not; the message names the metric.
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


def _zero(device: torch.device) -> torch.Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


def _fsum(values: Sequence[float]) -> float:
    # fsum refuses to add inf to -inf, and a sum that overflows; the plain sum tells of both.
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def _extreme(values: Sequence[float], sign: float) -> float:
    """The largest, or with a negative sign the smallest; NaN where one is there."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return sign * max(sign * value for value in values)
