"""Windows of ranks that know their own batches only, and agree on what there is a step ahead."""

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
"""In the place of the size of a batch that a rank does not have."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class JointWindow:
    """The batches that a rank has for a window, and how many samples its steps have."""

    batches: list[Any]
    own: list[int]
    """How many samples each step has here; no batch where that is negative."""
    told: GatheredNumbers
    """What the ranks tell each other of it."""
    sizes: list[StepSizes] = field(default_factory=list)
    """Of the steps that any rank has a batch for, once they have done so."""


class JointWindows:
    """Has ranks with different batches, and different numbers of them, go through a pass together.

    For each window, the ranks tell each other which batches they have and how many samples are in
    them. A window of one step is told while the step before is computed, for which its batch is
    loaded one step ahead; a longer one when all its batches are loaded. The pass is over when no
    rank has any. A rank that has none for a step takes part with the last one that it had, or with
    one that it is sent where it had none.

    Args:
        length: how many steps make a full window.
        count: how many samples a batch has, given the step's sizes where the data knows them.
    """

    def __init__(self, length: int, count: Callable[[Any, StepSizes | None], int]) -> None:
        self._length = length
        self._count = count
        self._filler: list[Any] = []  # the batch, if there is one

    def windows(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        lengths: Iterator[int],
        begun: Sequence[StepSizes],
        within: int,
        from_start: bool,
    ) -> Iterator[tuple[list[Any], list[StepSizes]]]:
        """What is left of a pass: the batches that are left of each window, and all its sizes.

        Args:
            batches: those that are left to this rank.
            given: what the data says of each, when it was given.
            lengths: how many steps to make in each window at most, those of the open one included.
            begun: the sizes of the window that is open, if one is.
            within: how many of its steps are done.
            from_start: whether nothing of the pass is done.
        """
        self._filler = []
        windows = self._loaded(batches, given, lengths, begun, within)
        window = next(windows, None)
        while window is not None:
            self._agree(window, within, from_start)
            if not window.sizes:
                return
            filler = self._filler
            ahead = next(windows, None) if self._length == 1 else None
            missing = len(window.sizes) - within - len(window.batches)
            yield window.batches + filler * missing, window.sizes
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
        """What this rank has for each window, loaded and told when it is asked for."""
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
            self._filler = [loaded[-1]]
        return JointWindow(loaded, own, GatheredNumbers([*own, len(self._filler)]))

    def _agree(self, window: JointWindow, within: int, from_start: bool) -> None:
        rows = window.told.wait()
        steps = list(zip(*(row[:-1] for row in rows), strict=True))
        if window.sizes:  # as they were when the window was begun
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
            if not self._filler:
                self._filler = [batch]
                if from_start:
                    _warn_without_data()


@cache
def _warn_without_data() -> None:
    logger.warning(
        "rank %d has no data, while others have: it takes part in their steps with batches that "
        "weigh nothing; see that every rank has a part of the data",
        torch.distributed.get_rank(),
    )
