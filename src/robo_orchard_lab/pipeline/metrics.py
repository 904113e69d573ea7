"""The board on which hooks publish named scalars for others to read."""

from __future__ import annotations

import difflib

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
        """Make ``value``, a number or a tensor of one element on any device, the latest."""
        self._latest[name] = value.detach() if isinstance(value, torch.Tensor) else value

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
