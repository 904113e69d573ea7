"""Transfer of small batches from workers, through shared memory that is used again.

Torch's transfer makes shared memory for each tensor, which costs the training process 0.4 ms. A
tensor sent as bytes waits where the pipe is full, with 64 KB, until the worker that writes gets a
core. A slot is shared memory of one worker: the worker copies the tensors of some batches into the
slot, and the training process copies them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

MAX_BYTES = 1 << 20
"""Size of the tensors in a slot. Copies of larger tensors cost more than torch's transfer."""
_ALIGNMENT = 64
_MAX_VIEWS = 256
_passes = count()


class Slot(NamedTuple):
    """Name of a slot, chosen by the training process."""

    pass_number: int
    """Pass over the loader; slots of an earlier pass are not used again."""
    number: int


class PackedBatches(NamedTuple):
    """Batches with :class:`_Place` in place of small tensors."""

    worker_id: int
    slot: Slot
    batches: list[Any]
    size: int
    """Bytes of the tensors in the slot."""
    memory: torch.Tensor | None
    """Memory of the slot, if the receiver doesn't know the memory yet."""


class _Place(NamedTuple):
    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


class SlotWriter:
    """Slots of a worker."""

    def __init__(self) -> None:
        self._pass_number: int | None = None
        self._memory: dict[int, torch.Tensor] = {}

    def pack(self, batches: list[Any], slot: Slot) -> PackedBatches:
        """Copy plain CPU tensors in lists, tuples and dicts into a slot; torch sends the rest."""
        tensors: list[tuple[torch.Tensor, _Place]] = []
        size = 0

        def place(tensor: torch.Tensor) -> Any:
            nonlocal size
            if not _is_plain(tensor) or (end := size + tensor.nbytes) > MAX_BYTES:
                return tensor
            found = _Place(size, end, tensor.dtype, tensor.shape)
            size = -(-end // _ALIGNMENT) * _ALIGNMENT
            tensors.append((tensor, found))
            return found

        packed = [_map(batch, torch.Tensor, place) for batch in batches]
        if not size:
            return PackedBatches(0, slot, batches, 0, None)
        memory, is_known = self._memory_of(slot, size)
        for tensor, found in tensors:
            _view(memory, found).copy_(tensor)
        info = get_worker_info()
        assert info is not None  # in a worker
        return PackedBatches(info.id, slot, packed, size, None if is_known else memory)

    def _memory_of(self, slot: Slot, size: int) -> tuple[torch.Tensor, bool]:
        """Return the memory of a slot, and True if the receiver knows the memory."""
        if slot.pass_number != self._pass_number:
            self._pass_number = slot.pass_number
            self._memory.clear()
        memory = self._memory.get(slot.number)
        if memory is not None and len(memory) >= size:
            return memory, True
        # A power of 2, since batches may differ in size.
        memory = torch.empty(1 << size.bit_length(), dtype=torch.uint8).share_memory_()
        self._memory[slot.number] = memory
        return memory, False


class SlotReader:
    """Receiver of one pass over the loader: assigns slots, and unpacks their batches in order.

    A slot is free once its batches were unpacked.
    """

    def __init__(self, slots: int) -> None:
        self._count = slots
        self._pass_number = next(_passes)
        self._assigned = self._unpacked = 0
        self._slots: dict[tuple[int, int], _SlotMemory] = {}

    def assign(self) -> Slot | None:
        """Return the next slot; None if the slot is in use."""
        number = self._assigned
        if number - self._unpacked >= self._count:
            return None
        self._assigned += 1
        return Slot(self._pass_number, number % self._count)

    def unpack(self, packed: PackedBatches) -> Iterator[Any]:
        """Yield the batches, with tensors in memory of their own."""
        key = packed.worker_id, packed.slot.number
        if packed.memory is not None:
            self._slots[key] = _SlotMemory(packed.memory)
        for batch in packed.batches:
            yield _map(batch, _Place, self._slots[key].tensor) if packed.size else batch
        self._unpacked += 1


class _SlotMemory:
    """Memory of a slot, with views of its tensors: to make a view costs more than to copy it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._views: dict[_Place, torch.Tensor] = {}

    def tensor(self, place: _Place) -> torch.Tensor:
        view = self._views.get(place)
        if view is None:
            if len(self._views) == _MAX_VIEWS:  # shapes differ from batch to batch
                self._views.clear()
            view = self._views[place] = _view(self._memory, place)
        return view.clone()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return True if bytes, dtype and shape are all there is to a tensor."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _view(memory: torch.Tensor, place: _Place) -> torch.Tensor:
    return memory[place.start : place.end].view(place.dtype).view(place.shape)


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the instances of a type in nested lists, tuples and dicts."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([_map(item, kind, function) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_map(item, kind, function) for item in value])
    if isinstance(value, dict):
        mapped = copy(value)
        mapped.update({key: _map(item, kind, function) for key, item in value.items()})
        return mapped
    return value
