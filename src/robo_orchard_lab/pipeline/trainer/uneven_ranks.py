"""Accumulation windows of ranks with uneven data, which exchange batch sizes a step in advance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import torch.distributed

from robo_orchard_lab.pipeline.data import StepSizes
from robo_orchard_lab.pipeline.distributed.collectives import GatheredNumbers, broadcast_object

_NONE = -1
"""Size of a missing batch."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class JointWindow:
    """Batches of this rank for one window, and the sample counts of its steps."""

    batches: list[Any]
    own: list[int]
    """Samples of each step on this rank; negative without a batch."""
    gathered: GatheredNumbers
    """Exchange of the sizes between ranks."""
    sizes: list[StepSizes] = field(default_factory=list)
    """Sizes of the steps that any rank has a batch for, after the exchange."""


class JointWindows:
    """Aligns ranks with different batches, and different numbers of batches, within an epoch.

    Ranks exchange the sizes of their batches for each window. A window of one step is exchanged
    during the step before, so its batch is loaded one step in advance. A longer window is exchanged
    when all its batches are loaded. The epoch ends when no rank has a batch. A rank without a batch
    runs a padding step with its last batch, or with a batch from another rank if it had none.

    Args:
        length: steps in a full window.
        count: counts the samples of a batch, given the step's sizes where the data knows them.
    """

    def __init__(self, length: int, count: Callable[[Any, StepSizes | None], int]) -> None:
        self._length = length
        self._count = count
        self._padding: list[Any] = []  # batch for padding steps, if any

    def windows(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        lengths: Iterator[int],
        begun: Sequence[StepSizes],
        within: int,
        from_start: bool,
    ) -> Iterator[tuple[list[Any], list[StepSizes]]]:
        """Yield the remaining batches of each window, and all its sizes.

        Args:
            batches: remaining batches of this rank.
            given: sizes of these batches, where the data knows them.
            lengths: maximum number of steps in each window, the open one included.
            begun: sizes of the open window, if any.
            within: steps of the open window that are done.
            from_start: True at the start of the epoch.
        """
        self._padding = []
        windows = self._loaded(batches, given, lengths, begun, within)
        window = next(windows, None)
        while window is not None:
            self._agree(window, within, from_start)
            if not window.sizes:
                return
            padding = self._padding
            ahead = next(windows, None) if self._length == 1 else None
            missing = len(window.sizes) - within - len(window.batches)
            yield window.batches + padding * missing, window.sizes
            within = 0
            window = ahead or next(windows, None)

    def _loaded(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        lengths: Iterator[int],
        begun: Sequence[StepSizes],
        within: int,
    ) -> Iterator[JointWindow]:
        """Load and exchange this rank's windows on demand."""
        if within:
            next(lengths)
            rest = sum(sizes.local != _NONE for sizes in begun[within:])
            window = self._load(batches, given, rest, skipped=within)
            window.sizes = list(begun)
            yield window
        for length in lengths:
            yield self._load(batches, given, length)

    def _load(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        count: int,
        skipped: int = 0,
    ) -> JointWindow:
        loaded, own = [], [_NONE] * self._length
        for step, batch in enumerate(islice(batches, count), start=skipped):
            loaded.append(batch)
            own[step] = self._count(batch, None if given is None else next(given))
        if loaded:
            self._padding = [loaded[-1]]
        return JointWindow(loaded, own, GatheredNumbers([*own, len(self._padding)]))

    def _agree(self, window: JointWindow, within: int, from_start: bool) -> None:
        rows = window.gathered.wait()
        steps = list(zip(*(row[:-1] for row in rows), strict=True))
        if window.sizes:  # as exchanged when the window began
            in_job = [sizes.total for sizes in window.sizes]
            window.sizes = list(map(StepSizes, window.own, in_job))
        else:
            window.sizes = [
                StepSizes(own, sum(size for size in step if size != _NONE))
                for own, step in zip(window.own, steps, strict=True)
                if max(step) != _NONE
            ]
        lacking = [not row[-1] for row in rows]
        if any(lacking) and window.sizes:
            source = next(rank for rank, size in enumerate(steps[within]) if size != _NONE)
            batch = broadcast_object(window.batches[0] if window.batches else None, source)
            if not self._padding:
                self._padding = [batch]
                if from_start:
                    _warn_without_data()


@cache
def _warn_without_data() -> None:
    logger.warning(
        "rank %d has no data while other ranks have: it runs padding steps; give every rank a "
        "part of the data",
        torch.distributed.get_rank(),
    )
