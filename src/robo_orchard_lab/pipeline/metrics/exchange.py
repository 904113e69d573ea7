"""Numbers and tensors of all ranks, in one transfer and one collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
