"""Batches of one epoch as dataset indices.

:class:`IndexedBatches` computes the batch of any step. :class:`IteratedBatches` iterates a custom
sampler up to the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Any, NamedTuple, TypeAlias

from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.fetching import PersistentRng
from robo_orchard_lab.pipeline.data.order import IndexOrder, StepPartition, StepSizes, split_evenly
from robo_orchard_lab.pipeline.progress import TrainerProgress


class BatchIndices(NamedTuple):
    """Indices of one process's batch in a step."""

    batch_id: int
    """Number of the batch in the epoch, over all processes, from 0."""
    numbers: Sequence[int]
    """Positions of the samples in the epoch's order, from 0."""
    indices: Any
    """Dataset indices of the samples."""
    sizes: StepSizes | None = None
    """Sizes of the step; None for a full batch of known order."""

    @property
    def is_padding_step(self) -> bool:
        """Return True if the batch repeats another process's samples and must not count."""
        return self.sizes is not None and self.sizes.local == 0


@dataclass(eq=False)
class IndexedBatches:
    """Batches of a known order, with random access.

    ``partition`` applies from ``first_step`` on, which begins with ``first_sample``: both are 0
    unless the run was resumed with a different batch size within the epoch. A batch has a single
    index if not ``batched``.
    """

    order: IndexOrder
    """Dataset indices of the epoch."""
    partition: StepPartition
    batched: bool = True
    first_step: int = 0
    first_sample: int = 0

    def __post_init__(self) -> None:
        rest = len(self.order) - self.first_sample
        self.steps = self.first_step + self.partition.steps(rest)
        self._full_steps = self.first_step + rest // self.partition.samples_per_step

    def samples_before(self, step_id: int) -> int:
        """Return the number of samples of all processes before a step."""
        return min(self._start_of(step_id), len(self.order))

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes]:
        """Return the sizes of the steps from ``step_id`` on."""
        rest = len(self.order) - self.first_sample
        return self.partition.sizes(rest, step_id - self.first_step)

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        """Yield the batches from a step on."""
        # Full batches are inlined: this is on the path of every step.
        partition, order, samples = self.partition, self.order, len(self.order)
        size, stride = partition.batch_size, partition.samples_per_step
        start = self._start_of(step_id) + partition.rank * size
        last_full = samples - stride + partition.rank * size
        for batch_id in range(
            step_id * partition.processes + partition.rank,
            self.steps * partition.processes,
            partition.processes,
        ):
            if start <= last_full and self.batched:
                numbers = range(start, start + size)
                yield BatchIndices(batch_id, numbers, list(order[start : start + size]))
            else:
                yield self._batch(batch_id // partition.processes)
            start += stride

    def at_step(self, step_id: int) -> BatchIndices | None:
        """Return the batch of a step; None after the last step."""
        return self._batch(step_id) if step_id < self.steps else None

    def local_size(self, step_id: int) -> int | None:
        """Return the number of samples of this process in a step; None after the last step."""
        if step_id < self._full_steps:
            return self.partition.batch_size
        numbers = self.partition.numbers(len(self.order), self._start_of(step_id))
        return len(numbers) if step_id < self.steps else None

    def _batch(self, step_id: int) -> BatchIndices:
        partition, samples, start = self.partition, len(self.order), self._start_of(step_id)
        numbers = partition.numbers(samples, start)
        sizes = StepSizes(len(numbers), min(samples - start, partition.samples_per_step))
        if not numbers:
            numbers = range(start, start + 1)  # padding
        indices = list(self.order[numbers.start : numbers.stop])
        batch_id = step_id * partition.processes + partition.rank
        return BatchIndices(batch_id, numbers, indices if self.batched else indices[0], sizes)

    def _start_of(self, step_id: int) -> int:
        steps = step_id - self.first_step
        return self.first_sample + steps * self.partition.samples_per_step


@dataclass(eq=False)
class IteratedBatches:
    """Batches of a sampler that must be iterated, with RNG streams of its own.

    With several processes, a step consists of one sampler batch per process. ``merge`` splits their
    samples evenly; otherwise each process gets one sampler batch. ``split`` makes a step of a
    single sampler batch, split evenly. A process without samples in the last step gets padding.
    """

    batches: Any
    """Batch sampler, or a sampler whose items each load a complete batch."""
    partition: StepPartition
    """Processes, and the batch size if known."""
    samples: int | None
    """Samples in the epoch, split as ``partition`` defines; None if unknown."""
    seed: int
    """Seed of the sampler's random streams."""
    progress: TrainerProgress
    batched: bool = True
    """True if a batch has a list of indices; False for a single index."""
    merge: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        self._rng = PersistentRng(self.seed)
        self._drops_last = self.partition.drop_last and self.merge and not self.split
        self._batches_per_step = 1 if self.split else self.partition.processes
        self._yielded: deque[tuple[int, BatchIndices]] = deque()
        steps_of, length = self.partition, self.samples
        if length is None:  # counted in batches of the sampler
            steps_of = StepPartition(self._batches_per_step, self._drops_last)
            length = count_batches(self.batches)
        self.steps = None if length is None else steps_of.steps(length)

    def samples_before(self, step_id: int) -> int | None:
        """Return the number of samples of all processes before a step; None if unknown."""
        if self.samples is None:
            return None
        return min(step_id * self.partition.samples_per_step, self.samples)

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """Return the sizes of the steps from ``step_id`` on; None if unknown.

        ``ahead`` requests each size before the step's batch was yielded.
        """
        if not ahead:
            return map(self._yielded_sizes, count(step_id))
        return None if self.samples is None else self.partition.sizes(self.samples, step_id)

    def _yielded_sizes(self, step_id: int) -> StepSizes:
        batch = self.at_step(step_id)
        assert batch is not None  # since it was yielded
        assert batch.sizes is not None
        return batch.sizes

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        """Yield the batches from a step on; iterates the sampler over the steps before."""
        self._yielded.clear()
        numbered = self._numbered()
        if step_id > 0:
            with self._rng:
                for _ in zip(range(step_id), numbered, strict=False):
                    self._rng.drop_cached_gaussian()
        return self._isolated(numbered, step_id)

    def at_step(self, step_id: int) -> BatchIndices | None:
        """Return the batch of the current step; None if no batch was yielded for the step."""
        self._forget_before(self.progress.step_id)
        for step, batch in self._yielded:
            if step == step_id:
                return batch
        return None

    def local_size(self, step_id: int) -> int | None:
        """Return the number of samples of this process in the current step; None without batch."""
        batch = self.at_step(step_id)
        return None if batch is None or batch.sizes is None else int(batch.sizes.local)

    def _forget_before(self, step_id: int) -> None:
        while self._yielded and self._yielded[0][0] < step_id:
            self._yielded.popleft()

    def _isolated(self, numbered: Iterator[BatchIndices], step_id: int) -> Iterator[BatchIndices]:
        for step in count(step_id):
            with self._rng:
                batch = next(numbered, None)
            if batch is None:
                return
            self._forget_before(self.progress.step_id)
            self._yielded.append((step, batch))
            yield batch

    def _numbered(self) -> Iterator[BatchIndices]:
        if self.partition.processes > 1:
            yield from self._local_batches()
            return
        start = 0
        for step, batch in enumerate(self.batches):
            size = len(batch) if self.batched else 1
            yield BatchIndices(step, range(start, start + size), batch, StepSizes(size, size))
            start += size

    def _local_batches(self) -> Iterator[BatchIndices]:
        """Yield this process's batch of each step of several processes."""
        processes, rank = self.partition.processes, self.partition.rank
        batches, start = iter(self.batches), 0
        for step in count():
            in_step = [
                list(batch) if self.batched else [batch]
                for batch in islice(batches, self._batches_per_step)
            ]
            indices = [index for batch in in_step for index in batch]
            total = len(indices)
            if not in_step or (self._drops_last and total < self.partition.samples_per_step):
                return
            if self.merge or self.split:
                local, padding = split_evenly(total, processes, rank), range(1)
            else:
                ends = [0, *accumulate(map(len, in_step))]
                local = range(*ends[rank : rank + 2]) if rank < len(in_step) else range(0)
                padding = range(ends[1])
            loaded = local or padding
            chosen = indices[loaded.start : loaded.stop]
            yield BatchIndices(
                step * processes + rank,
                range(start + loaded.start, start + loaded.stop),
                chosen if self.batched else chosen[0],
                StepSizes(len(local), total),
            )
            start += total


EpochBatches: TypeAlias = IndexedBatches | IteratedBatches
