"""Whether the losses of a window and the norm of its gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Finding:
    """The values of one update, on the host."""

    losses: tuple[float, ...]
    """This rank's, of each batch of the window."""
    norm: float | None
    """Of the gradients of all ranks; None where it is not looked at."""

    @property
    def bad_losses(self) -> list[int]:
        """The places in the window of the batches whose loss is not finite."""
        return [index for index, loss in enumerate(self.losses) if not math.isfinite(loss)]

    @property
    def bad_norm(self) -> bool:
        """Whether the norm is not finite."""
        return self.norm is not None and not math.isfinite(self.norm)

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_norm and not self.bad_losses

    def __str__(self) -> str:
        parts = []
        if bad := self.bad_losses:
            places = ", ".join(str(index + 1) for index in bad)
            of = f" in batch {places} of the window's {len(self.losses)}"
            parts.append(f"the loss is {self.losses[bad[0]]}{of if len(self.losses) > 1 else ''}")
        if self.bad_norm:
            parts.append(f"the gradient norm is {self.norm}")
        return " and ".join(parts)


def pack(losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
    """The values of one update as one tensor on their device, the norm last."""
    values = list(losses) if norm is None else [*losses, norm]
    device = values[0].device
    return torch.stack([value.detach().reshape(()).to(device) for value in values])


def unpack(values: Sequence[float], has_norm: bool) -> Finding:
    """What was packed, after it was read."""
    return Finding(tuple(values[:-1]), values[-1]) if has_norm else Finding(tuple(values), None)


class LateReading:
    """The values of one update on their way to the host, where they are looked at in the next.

    From a CUDA device they are copied to pinned memory while the host goes on.
    """

    def __init__(self) -> None:
        self._host: torch.Tensor | None = None
        self._count = 0
        self._copied: torch.cuda.Event | None = None

    def start(self, values: torch.Tensor) -> None:
        """Send the values; those before must have been taken."""
        self._count = len(values)
        if values.device.type != "cuda":
            self._host = values
            return
        if self._host is None or len(self._host) < len(values) or self._host.dtype != values.dtype:
            self._host = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
            self._copied = torch.cuda.Event()
        assert self._copied is not None
        self._host[: self._count].copy_(values, non_blocking=True)
        self._copied.record()

    def take(self) -> list[float]:
        """The values that were sent."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()  # waits for the device, which has got there long ago
        values: list[float] = self._host[: self._count].tolist()  # on other devices, this waits
        return values
