"""Dividing a stream of batches into accumulation windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice, repeat
from typing import Any, TypeAlias, TypeVar

from robo_orchard_lab.pipeline.batch_size import first_length
from robo_orchard_lab.pipeline.errors import DataError, StateError
from robo_orchard_lab.pipeline.job_log import job_logger

ItemT = TypeVar("ItemT")

MicroBatch: TypeAlias = tuple[Any, bool, float]
"""A batch; whether it ends its window; and what to divide its mean loss by, so that the gradients
that the window adds up are those of the mean over all of its samples."""

_END = object()

logger = job_logger(__name__)


class AccumulationWindows:
    """Divides a pass over the batches into windows, the last of which may be short.

    A window of n equal batches divides each loss by n; of unequal ones, each by the window's
    samples over its own. So n micro-batches equal one batch n times as large.

    Where the sizes of batches are not known ahead, or ``count_samples`` is given, a window's
    batches are all loaded before the first is given.

    Args:
        length: how many batches make a full window, >= 1; windows are counted from the first
            batch of the pass.
        count_samples: how many samples a batch has; None counts its first tensor's length.
    """

    def __init__(self, length: int, count_samples: Callable[[Any], int] | None) -> None:
        self.length = length
        self._count_samples = count_samples
        self._loaded_sizes: list[int] = []  # of the window that was last loaded ahead

    def micro_batches(
        self,
        batches: Iterator[Any],
        sizes: Callable[[int], Iterator[int] | None],
        done: int,
        limit: int | None,
    ) -> Iterator[MicroBatch]:
        """What is left of a pass.

        Args:
            batches: those that are left.
            sizes: how many samples each batch of the pass has, from one of them on; None where
                that is not known ahead.
            done: how many batches of the pass are done, maybe within a window.
            limit: how many batches of the pass to take at most; None takes all.

        Raises:
            DataError: while iterating, where there are more batches than sizes, or fewer.
            StateError: the pass goes on within a window of which the sizes were not saved.
        """
        if self.length == 1:  # in C, since this is every step of most runs
            return zip(batches, repeat(True), repeat(1.0))
        within = done % self.length
        begun = done - within  # the first batch of the window that is open, or next
        if limit is not None:
            limit -= begun
        known = sizes(begun) if self._count_samples is None else None
        if known is not None:
            return _sized_windows(batches, self.length, known, within, limit)
        if within and not self._loaded_sizes:
            raise StateError(
                f"the run was saved after {within} of the {self.length} batches of an accumulation "
                "window whose sizes were known ahead, and now are not; resume it with the kind of "
                "data loader and batch processor that it was saved with"
            )
        return self._loaded_ahead(batches, within, limit)

    def state_dict(self, done: int) -> dict[str, Any]:
        """What a window that is open after so many batches was planned by."""
        return {"loaded_sizes": self._loaded_sizes if done % self.length else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a window as it was planned."""
        self._loaded_sizes = list(state["loaded_sizes"])

    def _loaded_ahead(
        self, batches: Iterator[Any], within: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        count_samples = self._count_samples or _count
        if within:
            total, rest = sum(self._loaded_sizes), self._loaded_sizes[within:]
            for left, (size, batch) in enumerate(zip(rest, batches, strict=False), start=1):
                yield batch, left == len(rest), total / size
            limit = None if limit is None else limit - within - len(rest)
        for loaded in _chunks(batches, self.length, limit):
            sizes = self._loaded_sizes = [count_samples(batch) for batch in loaded]
            total = sum(sizes)
            for index, batch in enumerate(loaded):
                yield batch, index == len(loaded) - 1, total / sizes[index]


def _sized_windows(
    batches: Iterator[Any], window: int, sizes: Iterator[int], within: int, limit: int | None
) -> Iterator[MicroBatch]:
    """Windows, in the first of which so many batches are done."""
    begun = 0
    for samples in _chunks(sizes, window, limit):
        total = sum(samples)
        taken = within
        for batch in islice(batches, len(samples) - within):
            taken += 1
            yield batch, taken == len(samples), total / samples[taken - 1]
        if taken < len(samples):
            raise _wrong_length("fewer")
        begun += taken
        within = 0
    if begun != limit and next(batches, _END) is not _END:
        raise _wrong_length("more")


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
