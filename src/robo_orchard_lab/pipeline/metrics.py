"""The board on which hooks publish named scalars for others to read."""

from __future__ import annotations

import difflib

import numpy as np
import torch


class MetricsBoard:
    """The latest value of every published name.

    Values stay as they were published: a device tensor is not read before someone asks for it as
    a number.
    """

    __slots__ = ("_latest",)

    def __init__(self) -> None:
        self._latest: dict[str, float | torch.Tensor] = {}

    def publish(self, name: str, value: float | torch.Tensor) -> None:
        """Make ``value``, a number or a tensor of one element on any device, the latest.

        Raises:
            TypeError: it is neither; the message names the metric.
        """
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise TypeError(
                    f"metric {name!r} must be a single number, got a tensor of shape "
                    f"{tuple(value.shape)}; reduce it first"
                )
            value = value.detach()
        elif not isinstance(value, (float, int, np.number)):
            raise TypeError(f"metric {name!r} must be a number, got {type(value).__name__}")
        self._latest[name] = value

    def latest(self, name: str) -> float:
        """The latest value as a number. Reading a device tensor waits for the device.

        Raises:
            KeyError: the name was never published; the message lists those that were.
        """
        if name not in self._latest:
            near = difflib.get_close_matches(name, self._latest, n=1)
            raise KeyError(
                f"no metric {name!r} was published"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" Published: {', '.join(sorted(self._latest)) or 'none'}"
            )
        return float(self._latest[name])

    def names(self) -> list[str]:
        """The published names, in the order of their first publication."""
        return list(self._latest)
