"""Dividing a stream of batches into accumulation windows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, islice, repeat
from typing import Any, TypeAlias, TypeVar

from torch.utils.data import BatchSampler, DataLoader

from robo_orchard_lab.pipeline.batch_size import first_length
from robo_orchard_lab.pipeline.errors import DataError

ItemT = TypeVar("ItemT")

MicroBatch: TypeAlias = tuple[Any, bool, float]
"""A batch; whether it ends its window; and what to divide its mean loss by, so that the gradients
that the window adds up are those of the mean over all of its samples."""

_END = object()

logger = logging.getLogger(__name__)


def micro_batches(
    dataloader: Iterable[Any],
    window: int,
    limit: int | None,
    count_samples: Callable[[Any], int] | None,
    begin_window: Callable[[int], None],
) -> Iterator[MicroBatch]:
    """One pass over the batches in windows of ``window``, the last of which may be shorter.

    A window of n equal batches divides each loss by n; of unequal ones, each by the window's
    samples over its own. So n micro-batches equal one batch n times as large.

    A ``DataLoader`` says ahead how many samples its batches will have. Where that is not known,
    or ``count_samples`` is given, a window's batches are all loaded before the first is given.

    Args:
        dataloader: any iterable of batches.
        window: how many batches make a full window, >= 1.
        limit: how many batches to take at most; None takes all.
        count_samples: how many samples a batch has; None counts its first tensor's length.
        begin_window: called ahead of loading a window, with the number of batches before it.

    Raises:
        DataError: while iterating, where the loader's length is not that of its batches.
    """
    batches = iter(dataloader)
    if window == 1:  # in C, since this is every step of most runs
        return zip(batches, repeat(True), repeat(1.0))
    sizes = known_batch_sizes(dataloader) if count_samples is None else None
    if sizes is not None:
        return _sized_windows(batches, window, sizes, limit)
    return _windows_loaded_ahead(batches, window, limit, count_samples or _count, begin_window)


def _sized_windows(
    batches: Iterator[Any], window: int, sizes: Iterator[int], limit: int | None
) -> Iterator[MicroBatch]:
    done = 0
    for samples in _chunks(sizes, window, limit):
        total = sum(samples)
        taken = 0
        for taken, batch in enumerate(islice(batches, len(samples)), start=1):
            yield batch, taken == len(samples), total / samples[taken - 1]
        if taken < len(samples):
            raise _wrong_length("fewer")
        done += taken
    if done != limit and next(batches, _END) is not _END:
        raise _wrong_length("more")


def _windows_loaded_ahead(
    batches: Iterator[Any],
    window: int,
    limit: int | None,
    count_samples: Callable[[Any], int],
    begin_window: Callable[[int], None],
) -> Iterator[MicroBatch]:
    done = 0
    begin_window(done)
    for loaded in _chunks(batches, window, limit):
        sizes = [count_samples(batch) for batch in loaded]
        for index, batch in enumerate(loaded):
            yield batch, index == len(loaded) - 1, sum(sizes) / sizes[index]
        done += len(loaded)
        begin_window(done)


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


def known_batch_sizes(dataloader: Iterable[Any]) -> Iterator[int] | None:
    """The number of samples of each batch of one pass, or None where it can't be known ahead."""
    sampler = getattr(dataloader, "batch_sampler", None)
    if type(dataloader) is not DataLoader or type(sampler) is not BatchSampler:
        return None
    try:
        samples = len(sampler.sampler)  # type: ignore[arg-type]  # refused below where unsized
    except (TypeError, NotImplementedError):
        return None
    full, rest = divmod(samples, sampler.batch_size)
    return chain(repeat(sampler.batch_size, full), [rest] if rest and not sampler.drop_last else [])
