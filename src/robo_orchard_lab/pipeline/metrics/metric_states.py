"""States of torchmetrics metrics: copy out, merge over parts and ranks, pack into tensors, restore.

Private attributes of torchmetrics used here, for want of a public way:

- ``Metric._reductions``: the ``dist_reduce_fx`` of each state. Without, merging is an error.
- ``Metric._update_count``: some metrics read the count; the public ``update_count`` is read-only.
  Without, the updates before a resume are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics.accumulators import MetricValueError
from robo_orchard_lab.pipeline.metrics.exchange import pack_bytes, unpack_bytes

if TYPE_CHECKING:
    from torchmetrics import Metric

StateReduceFx: TypeAlias = Literal["sum", "mean", "max", "min", "cat"] | Callable[[Any], Any] | None
"""torchmetrics' ``dist_reduce_fx``: ``sum``, ``mean``, ``max`` and ``min`` are elementwise, ``cat``
concatenates along dim 0, None stacks, and a function receives the stacked parts. List states are
gathered instead of stacked."""

_ELEMENTWISE: Mapping[StateReduceFx, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True, slots=True)
class StateRule:
    """Reduction of a metric state over parts of the data."""

    reduction: StateReduceFx
    is_list: bool

    def merge(self, parts: Sequence[tuple[int, list[torch.Tensor]]]) -> list[torch.Tensor]:
        """Merge states of several parts, given as update count >= 1 and elements."""
        if self.is_list or self.reduction in ("cat", None) or callable(self.reduction):
            return [element for _, elements in parts for element in elements]
        values = [elements[0] for _, elements in parts]
        if self.reduction in _ELEMENTWISE:
            return [reduce(_ELEMENTWISE[self.reduction], values)]
        total = sum(updates for updates, _ in parts)  # mean: weight by updates
        weighted = [elements[0] * (updates / total) for updates, elements in parts]
        return [reduce(torch.add, weighted)]

    def compact(self, elements: list[torch.Tensor]) -> list[torch.Tensor]:
        """Concatenate the elements of a ``cat`` state."""
        if self.reduction != "cat" or len(elements) <= 1:
            return list(elements)
        return [torch.cat([torch.atleast_1d(element) for element in elements])]

    def restored(self, elements: list[torch.Tensor], parts: int) -> Any:
        """Return the value of the metric's attribute, equal to torchmetrics' own after a sync."""
        if self.is_list:
            if parts > 1 and callable(self.reduction):
                return self.reduction(elements)
            return self.compact(elements)
        if self.reduction == "cat":
            return self.compact(elements)[0]
        if parts == 1 or isinstance(self.reduction, str):
            return elements[0]
        stacked = torch.stack(elements)
        return stacked if self.reduction is None else self.reduction(stacked)


Rules: TypeAlias = Mapping[str, StateRule]
"""Reductions of one metric by state name."""


@dataclass(slots=True)
class MetricState:
    """State of a metric, outside of the metric."""

    updates: int
    """Number of updates."""
    states: dict[str, list[torch.Tensor]]
    """Elements of each state; a tensor state has one. ``cat`` states are not concatenated yet."""
    parts: int = 1
    """Number of merged parts that were updated."""

    def to(self, device: torch.device, copy: bool = False) -> MetricState:
        """Move the tensors to a device."""
        moved = {n: [e.to(device, copy=copy) for e in es] for n, es in self.states.items()}
        return MetricState(self.updates, moved, self.parts)


def rules_of(metric: Metric) -> Rules:
    """Return the declared reduction of each state."""
    from torchmetrics import utilities

    names: Mapping[Any, Any] = {
        utilities.dim_zero_sum: "sum",
        utilities.dim_zero_mean: "mean",
        utilities.dim_zero_max: "max",
        utilities.dim_zero_min: "min",
        utilities.dim_zero_cat: "cat",
    }
    declared = getattr(metric, "_reductions", {})
    reductions = {name: declared.get(name, _unknown_reduction) for name in metric.metric_state}
    return {
        name: StateRule(names.get(reductions[name], reductions[name]), isinstance(value, list))
        for name, value in metric.metric_state.items()
    }


def _unknown_reduction(parts: Any) -> Any:
    import torchmetrics

    raise MetricValueError(
        "merging the metrics of several ranks or parts needs Metric._reductions, which "
        f"torchmetrics {torchmetrics.__version__} lacks; install torchmetrics 1.8 or 1.9"
    )


def is_mergeable(metric: Metric) -> bool:
    """Return True if merged states of two parts of the data equal the state of both.

    This is torchmetrics' own condition for ``merge_state``. Updates of other metrics may depend on
    earlier updates, or on a reduction that runs only once.
    """
    return (
        metric.full_state_update is False
        and not metric.dist_sync_on_step
        and all(
            isinstance(rule.reduction, str) or (rule.is_list and rule.reduction is None)
            for rule in rules_of(metric).values()
        )
    )


def take_state(metric: Metric, rules: Rules, earlier: int = 0) -> MetricState:
    """Return the state without a copy; reset the metric afterwards to allocate new tensors.

    Args:
        metric: the metric.
        rules: its :func:`rules_of`.
        earlier: updates that the metric does not count, from :func:`put_state`.

    Raises:
        MetricValueError: a state holds an object that is not a tensor of numbers.
    """
    states = {}
    for name in rules:
        value = getattr(metric, name)
        states[name] = list(value) if isinstance(value, list) else [value]
        for element in states[name]:
            if not isinstance(element, torch.Tensor) or element.dtype not in _DTYPES:
                kind = getattr(element, "dtype", type(element).__name__)
                raise MetricValueError(
                    f"the state {name!r} of {type(metric).__name__} holds a {kind}; expected "
                    "tensors of numbers"
                )
    return MetricState(metric.update_count + earlier, states)


def put_state(metric: Metric, state: MetricState, rules: Rules, updates: int | None = None) -> int:
    """Set the state of a metric without a cached value; return the updates left uncounted."""
    for name, rule in rules.items():
        setattr(metric, name, rule.restored(state.states[name], state.parts))
    count = metric._update_count = state.updates if updates is None else updates
    return count - metric.update_count


def merge_states(parts: Sequence[MetricState], rules: Rules) -> MetricState:
    """Merge the states of several parts of the data; parts without updates are ignored."""
    updated = [part for part in parts if part.updates]
    if len(updated) <= 1:
        return updated[0] if updated else parts[0]
    return MetricState(
        sum(part.updates for part in updated),
        {
            name: rule.merge([(part.updates, part.states[name]) for part in updated])
            for name, rule in rules.items()
        },
        sum(part.parts for part in updated),
    )


def pack(
    states: Sequence[MetricState], rules: Sequence[Rules], device: torch.device
) -> list[torch.Tensor]:
    """Pack all metric states into a header (int64, CPU) and a byte tensor on ``device``.

    Headers and byte tensors of several ranks can be concatenated and then unpacked; shapes may
    differ between ranks. States shared by the metrics of a compute group are packed once.
    """
    header: list[int] = []
    tensors: list[torch.Tensor] = []
    seen: dict[tuple[int, ...], int] = {}
    index = 0
    for state, of_metric in zip(states, rules, strict=True):
        header += [state.updates, state.parts]
        for name, rule in of_metric.items():
            elements = state.states[name]
            first = seen.setdefault(tuple(map(id, elements)), index) if elements else index
            index += 1
            if first < index - 1:
                header.append(-1 - first)
                continue
            elements = rule.compact(elements)
            header.append(len(elements))
            for element in elements:
                header += [_DTYPES.index(element.dtype), element.dim(), *element.shape]
            tensors += elements
    return [torch.tensor(header, dtype=torch.int64), pack_bytes(tensors, device)]


def unpack(
    header: torch.Tensor, packed: torch.Tensor, rules: Sequence[Rules]
) -> list[list[MetricState]]:
    """Return the states of each rank from the concatenated results of :func:`pack`."""
    numbers, begin = iter(header.tolist()), 0

    def read_tensor() -> torch.Tensor:
        nonlocal begin
        dtype = _DTYPES[next(numbers)]
        shape = torch.Size([next(numbers) for _ in range(next(numbers))])
        (tensor,) = unpack_bytes(packed[begin:], [(dtype, shape)])
        begin += shape.numel() * dtype.itemsize
        return tensor

    ranks = []
    for first_number in numbers:
        states: list[MetricState] = []
        known: list[list[torch.Tensor]] = []
        for of_metric in rules:
            updates = next(numbers) if states else first_number
            state = MetricState(updates, {}, parts=next(numbers))
            for name in of_metric:
                count = next(numbers)
                known.append(
                    known[-1 - count] if count < 0 else [read_tensor() for _ in range(count)]
                )
                state.states[name] = known[-1]
            states.append(state)
        ranks.append(states)
    return ranks
