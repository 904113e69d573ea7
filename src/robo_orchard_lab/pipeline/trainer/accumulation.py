"""Dividing a stream of batches into accumulation windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from typing import Any, TypeAlias

from torch.utils.data import BatchSampler, DataLoader

from robo_orchard_lab.pipeline.batch_size import count_samples

MicroBatch: TypeAlias = tuple[Any, bool, float]
"""A batch; whether it ends its window; and what to divide its mean loss by, so that the gradients
that the window adds up are those of the mean over all of its samples."""


def micro_batches(
    batches: Iterator[Any],
    window: int,
    sizes: Iterator[int] | None,
    limit: int | None,
) -> Iterator[MicroBatch]:
    """The batches in windows of ``window``, the last of which may be shorter.

    A window of n equal batches divides each loss by n; of unequal ones, each by the window's
    samples over its own. So n micro-batches equal one batch n times as large.

    Args:
        batches: what to divide.
        window: how many batches make a full window, >= 1.
        sizes: how many samples each batch will have; None where that is not known ahead, which
            costs a look-ahead over the window.
        limit: how many batches to take at most; None takes all.
    """
    if window == 1:  # in C, since this is every step of most runs
        return zip(batches, repeat(True), repeat(1.0))
    return _windows(batches, window, sizes, limit)


def _windows(
    batches: Iterator[Any], window: int, sizes: Iterator[int] | None, limit: int | None
) -> Iterator[MicroBatch]:
    while limit is None or limit > 0:
        count = window if limit is None else min(window, limit)
        if sizes is not None:
            samples = list(islice(sizes, count))
            taken: Iterable[Any] = islice(batches, len(samples))
        else:
            taken = list(islice(batches, count))
            samples = [count_samples(batch) for batch in taken]
        if not samples:
            return
        total = sum(samples)
        for index, batch in enumerate(taken):
            yield batch, index == len(samples) - 1, total / samples[index]
        if limit is not None:
            limit -= len(samples)


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
