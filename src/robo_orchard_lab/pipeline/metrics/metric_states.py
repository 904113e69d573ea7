"""States of torchmetrics metrics: extract, merge, pack into tensors, and restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics.accumulators import MetricValueError

if TYPE_CHECKING:
    from torchmetrics import Metric

Joining: TypeAlias = Literal["sum", "mean", "max", "min", "cat"] | Callable[[Any], Any] | None
"""What makes one state of those of several parts: elementwise; ``cat``, along the first dimension;
a function of the parts, stacked; None: the parts, stacked. The elements of a list state are
gathered instead of stacked."""

_ELEMENTWISE: Mapping[Joining, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
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
    """How the parts of one state are joined."""

    joining: Joining
    is_list: bool

    def join(self, parts: Sequence[tuple[int, list[torch.Tensor]]]) -> list[torch.Tensor]:
        """Of the states of several parts, and how often each was updated, >= 1."""
        if self.is_list or self.joining in ("cat", None) or callable(self.joining):
            return [element for _, elements in parts for element in elements]
        values = [elements[0] for _, elements in parts]
        if self.joining in _ELEMENTWISE:
            return [reduce(_ELEMENTWISE[self.joining], values)]
        total = sum(updates for updates, _ in parts)
        weighted = [value * (updates / total) for value, (updates, _) in zip(values, parts)]  # noqa: B905 - one is made of the other
        return [reduce(torch.add, weighted)]

    def gathered(self, elements: list[torch.Tensor]) -> list[torch.Tensor]:
        """The elements, or what they are as one where it makes no difference."""
        return _concatenated(elements) if self.joining == "cat" else elements

    def final(self, elements: list[torch.Tensor], parts: int) -> Any:
        """What the metric itself has in the place of this state, as torchmetrics would set it."""
        if self.is_list:
            if parts > 1 and callable(self.joining):
                return self.joining(elements)
            return list(self.gathered(elements))
        if self.joining == "cat":
            return _concatenated(elements)[0]
        if parts == 1 or isinstance(self.joining, str):
            return elements[0]
        stacked = torch.stack(elements)
        return stacked if self.joining is None else self.joining(stacked)


Rules: TypeAlias = Mapping[str, StateRule]
"""Of one metric, by the name of the state."""


@dataclass(slots=True)
class MetricState:
    """What one metric has gathered."""

    updates: int
    """How often it was updated."""
    states: dict[str, list[torch.Tensor]]
    """The elements of each state, one of a tensor; those of ``cat`` are yet to be concatenated."""
    parts: int = field(default=1)
    """How many were joined, each of which was updated."""


def rules_of(metric: Metric) -> Rules:
    """How the states of a metric are joined, as it declares it."""
    from torchmetrics.utilities import (
        dim_zero_cat,
        dim_zero_max,
        dim_zero_mean,
        dim_zero_min,
        dim_zero_sum,
    )

    known: Mapping[Any, Any] = {
        dim_zero_sum: "sum",
        dim_zero_mean: "mean",
        dim_zero_max: "max",
        dim_zero_min: "min",
        dim_zero_cat: "cat",
    }
    rules = {}
    for name, declared in metric._reductions.items():
        joining: Joining = known.get(declared, declared)
        rules[name] = StateRule(joining, is_list=isinstance(metric._defaults[name], list))
    return rules


def is_mergeable(metric: Metric) -> bool:
    """Whether what it gathers in two parts of the data makes what it would have gathered in both.

    This is where torchmetrics itself merges states; other metrics may make one of several ranks'
    states only in the end, or their updates may depend on those before.
    """
    rules = rules_of(metric).values()
    return (
        metric.full_state_update is False
        and not metric.dist_sync_on_step
        and all(
            isinstance(rule.joining, str) or (rule.is_list and rule.joining is None)
            for rule in rules
        )
    )


def take_state(metric: Metric, rules: Rules) -> MetricState:
    """What it has gathered, without a copy; to be followed by a reset, which makes new tensors.

    Raises:
        MetricValueError: a state holds something else than tensors of numbers.
    """
    states = {}
    for name in rules:
        value = getattr(metric, name)
        states[name] = list(value) if isinstance(value, list) else [value]
        for element in states[name]:
            if not isinstance(element, torch.Tensor) or element.dtype not in _DTYPES:
                kind = getattr(element, "dtype", type(element).__name__)
                raise MetricValueError(
                    f"the state {name!r} of {type(metric).__name__} holds a {kind}, which can't be "
                    "read with the other metrics; only tensors of numbers can"
                )
    return MetricState(metric.update_count, states)


def put_state(metric: Metric, state: MetricState, rules: Rules) -> None:
    """Have the metric be what gathered the state."""
    for name, rule in rules.items():
        setattr(metric, name, rule.final(state.states[name], state.parts))
    metric._update_count = max(1, state.updates)  # or its compute would warn
    metric._computed = None


def merge_states(parts: Sequence[MetricState], rules: Rules) -> MetricState:
    """One state of several; those that were never updated count for nothing."""
    updated = [part for part in parts if part.updates]
    if len(updated) <= 1:
        return updated[0] if updated else parts[0]
    return MetricState(
        sum(part.updates for part in updated),
        {
            name: rule.join([(part.updates, part.states[name]) for part in updated])
            for name, rule in rules.items()
        },
        sum(part.parts for part in updated),
    )


def pack(
    states: Sequence[MetricState], rules: Sequence[Rules], device: torch.device
) -> list[torch.Tensor]:
    """All states as two tensors: where what is, and all bytes, on ``device``.

    Those of several ranks, concatenated, go back into the states of each by :func:`unpack`. They
    need not have the same shapes. A state that is that of another metric, as in the compute groups
    of a collection, is there once.
    """
    header: list[int] = []
    bytes_: list[torch.Tensor] = []
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
            elements = rule.gathered(elements)
            header.append(len(elements))
            for element in elements:
                header += [_DTYPES.index(element.dtype), element.dim(), *element.shape]
                flat = element.reshape(-1).contiguous()
                bytes_.append(flat.view(torch.uint8).to(device))
    packed = torch.cat(bytes_) if bytes_ else torch.zeros(0, dtype=torch.uint8, device=device)
    return [torch.tensor(header, dtype=torch.int64), packed]


def unpack(
    header: torch.Tensor, packed: torch.Tensor, rules: Sequence[Rules]
) -> list[list[MetricState]]:
    """The states of each rank, of what :func:`pack` made there, concatenated."""
    ranks = []
    numbers, begin = iter(header.tolist()), 0
    for updates in numbers:
        states, begin = _unpacked(updates, numbers, packed, begin, rules)
        ranks.append(states)
    return ranks


def _unpacked(
    updates: int,
    numbers: Iterator[int],
    packed: torch.Tensor,
    begin: int,
    rules: Sequence[Rules],
) -> tuple[list[MetricState], int]:
    """One rank's states, from its second number on, and where its bytes end."""
    states: list[MetricState] = []
    known: list[list[torch.Tensor]] = []
    for of_metric in rules:
        if states:
            updates = next(numbers)
        state = MetricState(updates, {}, next(numbers))
        for name in of_metric:
            count = next(numbers)
            elements = known[-1 - count] if count < 0 else []
            for _ in range(count):
                dtype = _DTYPES[next(numbers)]
                shape = torch.Size([next(numbers) for _ in range(next(numbers))])
                end = begin + shape.numel() * dtype.itemsize
                # A copy, whose first byte lies where any dtype may begin.
                elements.append(packed[begin:end].clone().view(dtype).reshape(shape))
                begin = end
            known.append(elements)
            state.states[name] = elements
        states.append(state)
    return states, begin


def _concatenated(elements: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if len(elements) <= 1:
        return list(elements)
    return [torch.cat([e.reshape(1) if e.dim() == 0 else e for e in elements])]
