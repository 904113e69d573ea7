"""Dividing a stream of batches into accumulation windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, repeat
from typing import Any, Protocol, TypeAlias, TypeVar

from robo_orchard_lab.pipeline.batch_size import first_length
from robo_orchard_lab.pipeline.data import StepSizes
from robo_orchard_lab.pipeline.errors import DataError, StateError
from robo_orchard_lab.pipeline.job_log import job_logger

ItemT = TypeVar("ItemT")

MicroBatch: TypeAlias = tuple[Any, bool, float]
"""A batch; whether it ends its window; and what to divide its mean loss by, so that the gradients
that the window adds up, in the mean of all ranks, are those of the mean over all of its samples.
That is infinite for a batch that weighs nothing, such as a filler."""

_END = object()

logger = job_logger(__name__)


class SizesOfSteps(Protocol):
    """How many samples the steps of a pass have, from one of them on."""

    def __call__(self, step_id: int, *, ahead: bool) -> Iterator[StepSizes] | None:
        """None where that is not known ahead, or when the batch of the step was given."""
        ...


class AccumulationWindows:
    """Divides a pass over the batches into windows, the last of which may be short.

    A window of n equal batches divides each loss by n; of unequal ones, each by the window's
    samples over its own. So n micro-batches equal one batch n times as large, and those of several
    ranks, whose gradients are averaged, one batch of all their samples.

    Where the sizes of batches are not known ahead, or ``count_samples`` is given, a window's
    batches are all loaded before the first is given.

    Args:
        length: how many batches make a full window, >= 1; windows are counted from the first
            batch of the pass.
        count_samples: how many samples a batch has; None counts its first tensor's length.
        processes: of how many ranks the gradients are averaged.
    """

    def __init__(
        self, length: int, count_samples: Callable[[Any], int] | None, processes: int = 1
    ) -> None:
        self.length = length
        self._count_samples = count_samples
        self._processes = processes
        self._loaded: list[StepSizes] = []  # of the window that was last loaded ahead

    def micro_batches(
        self, batches: Iterator[Any], sizes: SizesOfSteps, done: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        """What is left of a pass.

        Args:
            batches: those that are left.
            sizes: how many samples the steps of the pass have.
            done: how many batches of the pass are done, maybe within a window.
            limit: how many batches of the pass to take at most; None takes all.

        Raises:
            DataError: while iterating, where there are more batches than sizes, or fewer.
            StateError: the pass goes on within a window of which the sizes were not saved.
        """
        counted = self._count_samples is not None
        if self.length == 1:  # in C, since this is every step of most runs
            several = self._processes > 1
            in_turn = sizes(done, ahead=False) if several else None
            divisors = repeat(1.0) if in_turn is None else map(self._divisor, in_turn)
            return zip(batches, repeat(True), divisors)
        within = done % self.length
        begun = done - within  # the first batch of the window that is open, or next
        if limit is not None:
            limit -= begun
        known = None if counted else sizes(begun, ahead=True)
        if known is not None:
            return self._sized_windows(batches, known, within, limit)
        if within and not self._loaded:
            raise StateError(
                f"the run was saved after {within} of the {self.length} batches of an accumulation "
                "window whose sizes were known ahead, and now are not; resume it with the kind of "
                "data loader and batch processor that it was saved with"
            )
        given: Iterator[StepSizes] | None = None
        if self._processes > 1:
            rest = len(self._loaded) - within if within else 0
            given = sizes(done + rest, ahead=False)
        return self._loaded_ahead(batches, given, within, limit)

    def state_dict(self, done: int) -> dict[str, Any]:
        """What a window that is open after so many batches was planned by."""
        loaded = self._loaded if done % self.length else []
        return {
            "loaded_sizes": [sizes.own for sizes in loaded],
            "job_sizes": [sizes.job for sizes in loaded],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a window as it was planned."""
        own = state["loaded_sizes"]
        self._loaded = list(map(StepSizes, own, state.get("job_sizes", own)))

    def _divisor(self, sizes: StepSizes) -> float:
        """Of a batch that is a window by itself."""
        own, job = sizes
        return job / (own * self._processes) if own else math.inf

    def _divisors(self, window: Sequence[StepSizes]) -> list[float]:
        total = sum(sizes.job for sizes in window)
        return [self._divisor(StepSizes(sizes.own, total)) for sizes in window]

    def _sized_windows(
        self, batches: Iterator[Any], sizes: Iterator[StepSizes], within: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        """Windows, in the first of which so many batches are done."""
        begun = 0
        for window in _chunks(sizes, self.length, limit):
            divisors = self._divisors(window)
            taken = within
            for batch in islice(batches, len(window) - within):
                taken += 1
                yield batch, taken == len(window), divisors[taken - 1]
            if taken < len(window):
                raise _wrong_length("fewer")
            begun += taken
            within = 0
        if begun != limit and next(batches, _END) is not _END:
            raise _wrong_length("more")

    def _loaded_ahead(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        within: int,
        limit: int | None,
    ) -> Iterator[MicroBatch]:
        """Windows of which the sizes are known when all batches are loaded."""
        if within:
            rest = islice(batches, len(self._loaded) - within)
            yield from self._window(list(rest), within)
            limit = None if limit is None else max(limit - len(self._loaded), 0)
        for loaded in _chunks(batches, self.length, limit):
            if given is None:
                self._loaded = [StepSizes(size, size) for size in map(self._count, loaded)]
            else:
                self._loaded = list(islice(given, len(loaded)))
            yield from self._window(loaded, 0)

    def _window(self, loaded: Sequence[Any], within: int) -> Iterator[MicroBatch]:
        """The batches of a window that were loaded, the first of which comes after others."""
        divisors = self._divisors(self._loaded)
        for index, batch in enumerate(loaded, start=within):
            yield batch, index == len(divisors) - 1, divisors[index]

    def _count(self, batch: Any) -> int:
        return (self._count_samples or _count)(batch)


def _chunks(items: Iterator[ItemT], size: int, limit: int | None) -> Iterator[list[ItemT]]:
    """Lists of ``size`` items, the last of which may be shorter; ``limit`` items at most."""
    limited = items if limit is None else islice(items, limit)
    while chunk := list(islice(limited, size)):
        yield chunk


def _count(batch: Any) -> int:
    length = first_length(batch)
    if length is None:
        _warn_uncounted(type(batch).__qualname__)
    return length or 1


@cache
def _warn_uncounted(kind: str) -> None:
    logger.warning(
        "a batch of type %s has no tensor to count its samples by, so that it weighs 1 in its "
        "accumulation window; define count_samples(batch) on the batch processor if batches "
        "differ",
        kind,
    )


def _wrong_length(compared: str) -> DataError:
    return DataError(
        f"the dataloader gave {compared} batches than its sampler's length says, by which "
        "accumulation windows are planned; correct the length, or define count_samples(batch) on "
        "the batch processor, so that windows are loaded ahead and counted instead"
    )
