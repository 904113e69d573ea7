"""Packed device-to-host copy and all_gather of metrics.

:class:`RankGather` moves numbers and tensors of any shape and dtype; :func:`read_values` reduces
accumulators and :class:`DeferredMetrics` over the ranks at a logging point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from robo_orchard_lab.pipeline.metrics.accumulators import (
    Accumulator,
    MetricValue,
    combine,
    combine_values,
)

_HEADER = 3  # int64: bytes of the message, of its description, of its numbers
_MIN_CAPACITY = 1 << 14


@dataclass(frozen=True, slots=True)
class RankData:
    """Numbers and tensors of a rank."""

    label: str
    """Description of the content for the receiver."""
    numbers: Sequence[float]
    tensors: Sequence[torch.Tensor]
    """Tensors of any shape and device; received tensors are on the CPU."""


@dataclass(frozen=True, slots=True)
class RankBlock:
    """Data of the ranks with an equal label and equal sizes, as arrays with a row for each rank."""

    ranks: Sequence[int]
    """Ranks, in order."""
    label: str
    numbers: np.ndarray[Any, np.dtype[np.float64]]
    tensors: Sequence[torch.Tensor]
    """Tensors on the CPU, with the ranks as their first dimension."""


class RankGather:
    """All_gather of :class:`RankData`, whose content may differ between ranks.

    One process copies its tensors to the host in one transfer. Several processes gather one buffer
    of equal size. If one rank's data exceeds the buffer, all ranks see that, enlarge the buffer and
    gather a second time.
    """

    def __init__(self) -> None:
        self._capacity = _MIN_CAPACITY

    def __call__(self, data: RankData, accelerator: Any) -> list[RankData]:
        """Return the data of all ranks in rank order; see :meth:`blocks`."""
        return _by_rank(self.blocks(data, accelerator))

    def blocks(self, data: RankData, accelerator: Any) -> list[RankBlock]:
        """Return the data of all ranks: a collective, or two if the buffer grows.

        Blocks are in the order of their first ranks: of thousands of ranks, nearly all are in one.
        ``accelerator`` defines the ranks and the device to send from; None for one process.
        """
        if accelerator is None or accelerator.num_processes == 1:
            tensors = [tensor[None] for tensor in _copy_to_host(data.tensors)]
            return [RankBlock([0], data.label, np.array([data.numbers], float), tensors)]
        device: torch.device = accelerator.device
        shapes = [[str(tensor.dtype), *tensor.shape] for tensor in data.tensors]
        text = json.dumps([data.label, shapes]).encode()
        numbers = torch.tensor(data.numbers, dtype=torch.float64)
        packed = pack_bytes(data.tensors, device)
        size = 8 * _HEADER + len(text) + 8 * len(numbers) + len(packed)
        header = torch.tensor([size, len(text), 8 * len(numbers)])
        host = pack_bytes(
            [header, torch.frombuffer(bytearray(text), dtype=torch.uint8), numbers],
            torch.device("cpu"),
        )
        while True:
            message = torch.zeros(self._capacity, dtype=torch.uint8, device=device)
            if size <= self._capacity:
                message[: len(host)].copy_(host)
                message[len(host) : size].copy_(packed)
            else:
                message[: 8 * _HEADER].copy_(host[: 8 * _HEADER])
            rows = torch.empty(
                accelerator.num_processes, self._capacity, dtype=torch.uint8, device=device
            )
            torch.distributed.all_gather(list(rows.unbind()), message)  # a collective
            received = rows.cpu()  # a device sync
            headers = received[:, : 8 * _HEADER].contiguous().view(torch.int64).tolist()
            largest = max(size for size, _, _ in headers)
            if largest <= self._capacity:
                return [*_parse(received, headers)]
            self._capacity = 1 << (largest - 1).bit_length()


def _parse(received: torch.Tensor, headers: Sequence[Sequence[int]]) -> Iterator[RankBlock]:
    """Iterate over the blocks in the messages of all ranks."""
    rows = received.numpy()
    groups: dict[bytes, list[int]] = {}  # ranks by their header and description
    for rank, (_, n_text, _) in enumerate(headers):
        groups.setdefault(rows[rank, : 8 * _HEADER + n_text].tobytes(), []).append(rank)
    for described, ranks in groups.items():
        size, n_text, n_numbers = headers[ranks[0]]
        content = received[:, 8 * _HEADER + n_text : size]
        if len(ranks) < len(rows):
            content = content[ranks]
        label, shapes = json.loads(described[8 * _HEADER :])
        specs = [(getattr(torch, name.split(".")[1]), torch.Size(sizes)) for name, *sizes in shapes]
        numbers = torch.float64, torch.Size([n_numbers // 8])
        first, *tensors = unpack_bytes(content, [numbers, *specs])
        yield RankBlock(ranks, label, first.numpy(), tensors)


def _by_rank(blocks: Sequence[RankBlock]) -> list[RankData]:
    found: dict[int, RankData] = {}
    for block in blocks:
        for row, (rank, numbers) in enumerate(
            zip(block.ranks, block.numbers.tolist(), strict=True)
        ):
            found[rank] = RankData(block.label, numbers, [tensor[row] for tensor in block.tensors])
    return [found[rank] for rank in sorted(found)]


def _copy_to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    tensors = [tensor.detach() for tensor in tensors]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return [tensor.clone() for tensor in tensors]
    packed = pack_bytes(tensors, device).cpu()  # a device sync
    return unpack_bytes(packed, [(tensor.dtype, tensor.shape) for tensor in tensors])


def pack_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Concatenate the bytes of tensors to a uint8 tensor on ``device``."""
    flat = [t.detach().reshape(-1).contiguous().view(torch.uint8).to(device) for t in tensors]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8, device=device)


def unpack_bytes(
    packed: torch.Tensor, specs: Iterable[tuple[torch.dtype, torch.Size]]
) -> list[torch.Tensor]:
    """Split the result of :func:`pack_bytes` into tensors of the given dtypes and shapes.

    Results may be stacked: leading dimensions of ``packed`` are those of each tensor.
    """
    tensors, begin = [], 0
    for dtype, shape in specs:
        end = begin + shape.numel() * dtype.itemsize
        # The clone is aligned for any dtype; a slice may not be.
        own = packed[..., begin:end].clone(memory_format=torch.contiguous_format)
        tensors.append(own.reshape(-1).view(dtype).reshape([*packed.shape[:-1], *shape]))
        begin = end
    return tensors


StateReduction: TypeAlias = str | Callable[[torch.Tensor], torch.Tensor] | None
"""Reduction of a state over the ranks: ``sum``, ``mean``, ``max`` and ``min`` are elementwise,
``cat`` concatenates along dim 0, None stacks, and a function receives the stacked tensor."""


class DeferredMetrics(Protocol):
    """Metrics computed on the host from device tensors, after their reduction over the ranks.

    All ranks must hold metrics of the same kind and names.
    """

    def names(self) -> Sequence[str]:
        """Return the metric names, known before the values."""
        ...

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        """Return this rank's tensors with their reductions over the ranks."""
        ...

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        """Compute the values by name from the reduced tensors on the CPU."""
        ...


def resolve(deferred: DeferredMetrics, accelerator: Any = None) -> dict[str, float]:
    """Compute deferred metrics now: a transfer and, with several processes, a collective."""
    states = deferred.states()
    data = RankData("", (), [tensor for tensor, _ in states])
    ranks = [rank.tensors for rank in RankGather()(data, accelerator)]
    return dict(deferred.values(reduce_states(ranks, [reduce for _, reduce in states])))


def reduce_states(
    ranks: Sequence[Sequence[torch.Tensor]], reductions: Sequence[StateReduction]
) -> list[torch.Tensor]:
    """Reduce each tensor over the ranks."""
    return [
        _reduce_state([tensors[index] for tensors in ranks], reduce)
        for index, reduce in enumerate(reductions)
    ]


def _reduce_state(tensors: list[torch.Tensor], reduce: StateReduction) -> torch.Tensor:
    if reduce == "cat":
        return torch.cat([torch.atleast_1d(tensor) for tensor in tensors])
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


def read_values(
    gather: RankGather,
    accumulators: Mapping[str, Accumulator],
    deferred: Sequence[tuple[DeferredMetrics, int]],
    accelerator: Any,
) -> list[MetricValue]:
    """Reduce published metrics over all ranks: a single transfer, a single collective.

    Names of ``accumulators`` may differ between ranks; ``deferred`` metrics and their steps are
    identical.

    Raises:
        ValueError: ranks published one name with different reductions.
    """
    if not deferred and (accelerator is None or accelerator.num_processes == 1):
        return _read_alone(accumulators)
    layout = []  # name, reduction, number of numbers and of tensors of each accumulator
    numbers: list[float] = []
    scalars: list[torch.Tensor] = []
    for name, accumulator in accumulators.items():
        own_numbers, own_tensors = accumulator.numbers(), accumulator.tensors()
        layout.append((name, accumulator.reduce, len(own_numbers), len(own_tensors)))
        numbers += [accumulator.step, *own_numbers]
        scalars += own_tensors
    states = [metrics.states() for metrics, _ in deferred]
    flat = [tensor for own in states for tensor, _ in own]
    data = RankData(json.dumps(layout), numbers, [_stack(scalars), *flat])
    blocks = gather.blocks(data, accelerator)

    values = [*_combine(blocks)]
    if not deferred:
        return values
    ranks = _by_rank(blocks)
    begin = 1  # after the scalars
    for (metrics, step), own in zip(deferred, states, strict=True):
        end = begin + len(own)
        tensors = [rank.tensors[begin:end] for rank in ranks]
        reduced = reduce_states(tensors, [reduce for _, reduce in own])
        values += [MetricValue(n, float(v), step) for n, v in metrics.values(reduced).items()]
        begin = end
    return values


def _read_alone(accumulators: Mapping[str, Accumulator]) -> list[MetricValue]:
    """Read the accumulators of the only rank: a single transfer, if there is a tensor."""
    tensors = [each.tensors() for each in accumulators.values()]
    scalars = [tensor for own in tensors for tensor in own]
    on_host = iter(_stack(scalars).tolist() if scalars else ())  # a device sync
    values = []
    for (name, each), own in zip(accumulators.items(), tensors, strict=True):
        rank = each.numbers(), [*islice(on_host, len(own))] if own else ()
        values.append(MetricValue(name, combine(each.reduce, [rank]), each.step))
    return values


def _combine(blocks: Sequence[RankBlock]) -> Iterator[MetricValue]:
    """Reduce the accumulators of all ranks."""
    layouts, scalars = [], []
    for block in blocks:
        layouts.append(_places(block.label))
        scalars.append(np.array(block.tensors[0].tolist(), ndmin=2))
    for name in dict.fromkeys(name for layout in layouts for name in layout):
        step, reduction, parts = 0, "", list[_Part]()
        for block, layout, own in zip(blocks, layouts, scalars, strict=True):
            if (place := layout.get(name)) is None:
                continue
            reduce, begin, end, first, last = place
            if reduce != (reduction := reduction or reduce):
                raise ValueError(
                    f"metric {name!r} is published with reduce={reduction!r} on one rank "
                    f"and with {reduce!r} on another"
                )
            step = max(step, int(block.numbers[:, begin].max()))
            parts.append((block.ranks, block.numbers[:, begin + 1 : end], own[:, first:last]))
        yield MetricValue(name, _combine_parts(reduction, parts), step)


_Part: TypeAlias = tuple[Sequence[int], np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Ranks, and the numbers and tensors of a metric, with a row for each of the ranks."""


def _combine_parts(reduce: str, parts: Sequence[_Part]) -> float:
    """Reduce the values of all ranks, as `combine` does."""
    if reduce not in ("mean", "sum"):
        rows = [(ranks, np.hstack([numbers, tensors])) for ranks, numbers, tensors in parts]
        return combine_values(reduce, _in_rank_order(rows))
    values, weights = (
        _in_rank_order([(ranks, numbers[:, i : i + 1]) for ranks, numbers, _ in parts])
        + _in_rank_order([(ranks, tensors[:, i : i + 1]) for ranks, _, tensors in parts])
        for i in (0, 1)
    )
    return combine_values(reduce, values, weights)


def _in_rank_order(parts: Sequence[tuple[Sequence[int], np.ndarray[Any, Any]]]) -> list[float]:
    """Return the elements of all rows, in the order of the ranks."""
    elements = np.concatenate([rows.ravel() for _, rows in parts])
    if len(parts) > 1:
        ranks = np.concatenate([np.repeat(ranks, rows.shape[1]) for ranks, rows in parts])
        elements = elements[ranks.argsort(kind="stable")]
    found: list[float] = elements.tolist()
    return found


_Place: TypeAlias = tuple[str, int, int, int, int]
"""Reduction of a metric, and the ranges of its step and numbers, and of its tensors."""


def _places(label: str) -> dict[str, _Place]:
    places, number, scalar = dict[str, _Place](), 0, 0
    for name, reduce, n_numbers, n_tensors in json.loads(label):
        ends = number + 1 + n_numbers, scalar + n_tensors
        places[name] = reduce, number, ends[0], scalar, ends[1]
        number, scalar = ends
    return places


def _stack(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack scalars to a 1-dim tensor on a common device."""
    if not scalars:
        return torch.zeros(0)
    devices = {scalar.device for scalar in scalars}
    if len(devices) > 1:
        device = next(device for device in devices if device.type != "cpu")
        scalars = [scalar.to(device) for scalar in scalars]
    return torch.stack([*scalars])
