"""Moving batches to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device


def placement_of(
    accelerator: Accelerator, dataloader: Iterable[Any]
) -> Callable[[Any], Any] | None:
    """What moves a batch to the device; None where it is there already, or the user moves it.

    From pinned memory (``DataLoader(pin_memory=True)``, or Accelerate's ``non_blocking``) a batch
    travels while the host goes on, to a CUDA device also while that is busy with the step before.
    """
    device = accelerator.device
    if not accelerator.device_placement or device.type == "cpu":
        return None
    pinned = accelerator.dataloader_config.non_blocking or getattr(dataloader, "pin_memory", False)
    if pinned and device.type == "cuda":
        return CopyStream(device)
    return partial(send_to_device, device=device, non_blocking=pinned)


class CopyStream:
    """Copies batches in a CUDA stream of its own, ahead of which no step is waited for.

    The host launches steps faster than the device does them, and asks for the next batch early. In
    the stream of the steps, its copy would wait for all that was launched; here it runs beside
    them, and the next step waits for the copy alone. No batch is asked for before it is due.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Any) -> Any:
        """The batch on the device, for use in the current stream."""
        if not _is_copied_whole(batch):
            return send_to_device(batch, self._device, non_blocking=True)
        with torch.cuda.stream(self.stream):
            placed = send_to_device(batch, self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self.stream)
        for tensor in tensors_in(placed):
            # Else its memory would be free for the next batch while the step still reads it.
            tensor.record_stream(current)
        return placed


def _is_copied_whole(batch: Any) -> bool:
    """Whether all that is moved are tensors of the host, which depend on no stream."""
    return all(
        isinstance(part, torch.Tensor) and part.device.type == "cpu" for part in movable_in(batch)
    )


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """The tensors of a batch, in whatever lists, tuples and mappings."""
    return [part for part in movable_in(batch) if isinstance(part, torch.Tensor)]


def movable_in(batch: Any) -> list[Any]:
    """What in a batch is moved to a device: tensors, and others that have a ``to``.

    >>> movable_in({"image": torch.zeros(1), "names": ["a"], "more": (torch.ones(1), None)})
    [tensor([0.]), tensor([1.])]
    """
    if hasattr(batch, "to"):  # a mapping that has one moves by it
        return [batch]
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in movable_in(value)]
    if isinstance(batch, (list, tuple)):
        return [part for value in batch for part in movable_in(value)]
    return []
