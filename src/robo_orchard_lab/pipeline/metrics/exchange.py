"""Numbers and tensors of all ranks, in one transfer and one collective."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics.accumulators import (
    WINDOWS,
    MetricValue,
    Parts,
    Reduction,
    Window,
)

# --- exchange --------------------------------------------------------------------------------


_HEADER = 4  # int64: bytes needed; bytes of layout, of numbers, of tensors
_MIN_CAPACITY = 1 << 14
_DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one rank has to tell."""

    label: str
    """What is in it, for the reader; sent only when it differs from the last one."""
    numbers: Sequence[float]
    tensors: Sequence[torch.Tensor]
    """Of any shape; where they come out again, they are on the CPU."""


class Exchange:
    """Hands every rank the parcels of all ranks; ranks may have different things to tell.

    One process reads its tensors from their device, packed as one. Several gather one buffer of a
    size that all know. Where a rank has more to tell than fits, all see so, and gather once more;
    the buffer then stays as large as that took.
    """

    def __init__(self) -> None:
        self._capacity = _MIN_CAPACITY
        self._sent = ""
        self._received: list[str] = []

    def __call__(self, parcel: Parcel, accelerator: Any) -> list[Parcel]:
        """The parcels by rank.

        Args:
            parcel: this rank's.
            accelerator: the processes that take part, and the device to send from.
        """
        if accelerator is None or accelerator.num_processes == 1:
            return [_read_back(parcel)]
        device: torch.device = accelerator.device
        shapes = ";".join(_shape_text(tensor) for tensor in parcel.tensors)
        label = f"{shapes}\n{parcel.label}"
        while True:
            message = self._message(label, parcel, device)
            gathered = _gather(message, accelerator.num_processes)
            needs = [int(row[:8].view(torch.int64)) for row in gathered]  # on the CPU by now
            if max(needs) <= self._capacity:
                break
            self._capacity = 1 << (max(needs) - 1).bit_length()
        self._received = self._received or [""] * len(gathered)
        self._sent = label
        return [self._opened(rank, row) for rank, row in enumerate(gathered)]

    def _message(self, label: str, parcel: Parcel, device: torch.device) -> torch.Tensor:
        text = b"" if label == self._sent else label.encode()
        parts = [tensor.detach().reshape(-1) for tensor in parcel.tensors]
        tensor_bytes = sum(part.numel() * part.element_size() for part in parts)
        lengths = [len(text), 8 * len(parcel.numbers), tensor_bytes]
        need = 8 * _HEADER + sum(lengths)
        message = torch.zeros(self._capacity, dtype=torch.uint8, device=device)
        pieces = [torch.tensor([need, *lengths]).view(torch.uint8)]
        if need <= self._capacity:
            if text:
                pieces.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            numbers = torch.tensor(parcel.numbers, dtype=torch.float64)
            pieces.append(numbers.view(torch.uint8))
        host = torch.cat(pieces)
        message[: len(host)].copy_(host)
        if need <= self._capacity and tensor_bytes:
            packed = torch.cat([part.contiguous().view(torch.uint8).to(device) for part in parts])
            message[need - tensor_bytes : need].copy_(packed)
        return message

    def _opened(self, rank: int, row: torch.Tensor) -> Parcel:
        need, text, numbers, _ = row[: 8 * _HEADER].view(torch.int64).tolist()
        begin = 8 * _HEADER
        if text:
            self._received[rank] = bytes(row[begin : begin + text].tolist()).decode()
            begin += text
        shapes, _, label = self._received[rank].partition("\n")
        figures = row[begin : begin + numbers].clone().view(torch.float64).tolist()
        begin += numbers
        return Parcel(label, figures, _unpacked(row[begin:need], shapes))


def _gather(message: torch.Tensor, processes: int) -> list[torch.Tensor]:
    rows = torch.empty(processes, len(message), dtype=torch.uint8, device=message.device)
    torch.distributed.all_gather(list(rows.unbind()), message)  # a collective
    return list(rows.cpu().unbind())  # waits for the device


def _read_back(parcel: Parcel) -> Parcel:
    tensors = [tensor.detach() for tensor in parcel.tensors]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return Parcel(parcel.label, parcel.numbers, [tensor.clone() for tensor in tensors])
    shapes = ";".join(map(_shape_text, tensors))
    device = next(tensor.device for tensor in tensors if tensor.device.type != "cpu")
    flat = [tensor.reshape(-1).contiguous().view(torch.uint8).to(device) for tensor in tensors]
    packed = torch.cat(flat).cpu()  # waits for the device
    return Parcel(parcel.label, parcel.numbers, _unpacked(packed, shapes))


def _shape_text(tensor: torch.Tensor) -> str:
    if str(tensor.dtype) not in _DTYPES:
        raise TypeError(f"can't exchange a tensor of {tensor.dtype}")
    return f"{tensor.dtype} {' '.join(map(str, tensor.shape))}"


def _unpacked(packed: torch.Tensor, shapes: str) -> list[torch.Tensor]:
    tensors, begin = [], 0
    for text in shapes.split(";") if shapes else []:
        name, *sizes = text.split()
        shape = torch.Size(map(int, sizes))
        end = begin + shape.numel() * _DTYPES[name].itemsize
        # A copy, whose first byte lies where any dtype may begin.
        tensors.append(packed[begin:end].clone().view(_DTYPES[name]).reshape(shape))
        begin = end
    return tensors


# --- deferred --------------------------------------------------------------------------------
# Metrics whose values follow from tensors that all ranks have a part of.


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


# --- reader ----------------------------------------------------------------------------------
# From windows and deferred metrics of all ranks to values.


Layout: TypeAlias = tuple[tuple[str, Reduction, int, int], ...]
"""Name, reduction, and how many numbers and tensors there are, of each window."""


class Reader:
    """Reads what was published: one transfer and, with several ranks, one collective."""

    def __init__(self) -> None:
        self._exchange = Exchange()

    def read(
        self,
        windows: Mapping[str, Window],
        deferred: Sequence[tuple[DeferredMetrics, int]],
        accelerator: Any,
    ) -> list[MetricValue]:
        """The values of all ranks.

        Args:
            windows: this rank's, by name; other ranks may have other names.
            deferred: metrics and the step they belong to, alike on all ranks.
            accelerator: the processes; None for this one alone.

        Raises:
            ValueError: ranks have published one name with different reductions.
        """
        layout = []
        numbers: list[float] = []
        scalars: list[torch.Tensor] = []
        for name, window in windows.items():
            own_numbers, own_tensors = window.numbers(), window.tensors()
            layout.append((name, window.reduce, len(own_numbers), len(own_tensors)))
            numbers += [window.step, *own_numbers]
            scalars += own_tensors
        states = [metrics.states() for metrics, _ in deferred]
        flat = [tensor for own in states for tensor, _ in own]
        parcel = Parcel(_label_of(tuple(layout)), numbers, [_stacked(scalars), *flat])
        ranks = self._exchange(parcel, accelerator)

        values = [*_combined(ranks)]
        begin = 1  # behind the scalars
        for (metrics, step), own in zip(deferred, states, strict=True):
            end = begin + len(own)
            tensors = [rank.tensors[begin:end] for rank in ranks]
            reduced = reduce_states(tensors, [reduce for _, reduce in own])
            values += [MetricValue(n, float(v), step) for n, v in metrics.values(reduced).items()]
            begin = end
        return values


# From one logging point to the next the names are mostly the same, and JSON takes its time.


@lru_cache(maxsize=16)
def _label_of(layout: Layout) -> str:
    return json.dumps(layout)


@lru_cache(maxsize=64)
def _layout_of(label: str) -> Layout:
    return tuple(tuple(entry) for entry in json.loads(label))


def _combined(ranks: Sequence[Parcel]) -> Iterator[MetricValue]:
    """What the windows of all ranks give together."""
    reductions: dict[str, str] = {}
    steps: dict[str, int] = {}
    parts: dict[str, list[Parts]] = {}
    for rank in ranks:
        figures, read = iter(rank.numbers), iter(rank.tensors[0].tolist())
        for name, reduce, n_numbers, n_tensors in _layout_of(rank.label):
            if reductions.setdefault(name, reduce) != reduce:
                raise ValueError(
                    f"metric {name!r} is published with reduce={reductions[name]!r} on one rank "
                    f"and with {reduce!r} on another"
                )
            steps[name] = max(steps.get(name, 0), int(next(figures)))
            part = list(islice(figures, n_numbers)), list(islice(read, n_tensors))
            parts.setdefault(name, []).append(part)
    for name, of_ranks in parts.items():
        yield MetricValue(name, WINDOWS[reductions[name]].combine(of_ranks), steps[name])


def _stacked(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row of all scalars, on one device."""
    if not scalars:
        return torch.zeros(0)
    devices = {scalar.device for scalar in scalars}
    if len(devices) > 1:
        device = next(device for device in devices if device.type != "cpu")
        scalars = [scalar.to(device) for scalar in scalars]
    return torch.stack([*scalars])
