"""From windows and deferred metrics of all ranks to values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics.deferred import DeferredMetrics, reduce_states
from robo_orchard_lab.pipeline.metrics.exchange import Exchange, Parcel
from robo_orchard_lab.pipeline.metrics.record import MetricValue
from robo_orchard_lab.pipeline.metrics.window import WINDOWS, Parts, Reduction, Window

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
