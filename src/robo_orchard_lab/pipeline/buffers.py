"""The buffers of a model as they were."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_

import torch

from robo_orchard_lab.pipeline.plain_model import plain_name


class BufferKeeper:
    """Copies of a model's buffers, on their device, and putting them back.

    Which buffers a forward pass changes can't be told: the running statistics of batch
    normalisation change without a trace in the tensors' version counters. So all are copied.
    """

    def __init__(self) -> None:
        self._places: list[tuple[torch.nn.Module, str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] | None = None
        self._loaded: Mapping[str, torch.Tensor] | None = None

    def attach(self, model: torch.nn.Module) -> None:
        """Look up where the buffers are; :meth:`named` has the names of the plain model."""
        self._places = [
            (module, name, plain_name(f"{path}.{name}" if path else name))
            for path, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
        ]
        if self._loaded is not None:
            self._live = self._now()
            self._copies = [
                self._loaded[full].to(live.device)
                for (_, _, full), live in zip(self._places, self._live, strict=True)
            ]
            self._loaded = None

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are; nothing is read from the device."""
        live = self._now()
        if self._copies is not None and all(map(is_, live, self._live)):
            if live:
                torch._foreach_copy_(self._copies, live)
        else:  # the first time, and where a forward pass sets new tensors in their place
            self._live, self._copies = live, [buffer.clone() for buffer in live]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back as they were when they were last copied."""
        for (module, name, _), copy in zip(self._places, self._copies or (), strict=False):
            live = getattr(module, name)
            if live is not None and live.shape == copy.shape:
                live.copy_(copy)
            else:
                setattr(module, name, copy.clone())

    def named(self) -> dict[str, torch.Tensor]:
        """The copies, which the next :meth:`keep` changes."""
        return {
            full: copy for (_, _, full), copy in zip(self._places, self._copies or (), strict=False)
        }

    def load(self, named: Mapping[str, torch.Tensor]) -> None:
        """Take over copies that :meth:`named` gave, when attached to the same model."""
        self._loaded = named

    def _now(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name, _ in self._places]
