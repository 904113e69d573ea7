"""The batches of one epoch: which samples each is made of, by position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

from accelerate.data_loader import BatchSamplerShard

from robo_orchard_lab.pipeline.batch_size import count_batches
from robo_orchard_lab.pipeline.data.division import Division
from robo_orchard_lab.pipeline.data.index_order import IndexOrder
from robo_orchard_lab.pipeline.data.streams_aside import ContinuedStreams
from robo_orchard_lab.pipeline.progress import TrainerProgress


class BatchIndices(NamedTuple):
    """What one process's batch of a step is made of."""

    batch_id: int
    """Among those of all processes in the epoch, from 0."""
    numbers: Sequence[int]
    """Of its samples in the order of the epoch, from 0."""
    indices: Any
    """Of its samples in the dataset."""


class EpochBatches(Protocol):
    """One pass over the batches of this process."""

    @property
    def steps(self) -> int | None:
        """How many there are; None where only passing over them tells."""
        ...

    def samples_before(self, step_id: int) -> int | None:
        """How many samples of the whole job are done when a step begins; None: not known."""
        ...

    def sizes(self, step_id: int) -> Iterator[int] | None:
        """How many samples each batch has from a step on; None where that is not known ahead."""
        ...

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        """The batches from a step on."""
        ...

    def at_step(self, step_id: int) -> BatchIndices | None:
        """The batch of the step that is being done; None where it has not been given."""
        ...


class IndexedBatches:
    """Batches of an order that is known: any of them is found at once.

    Args:
        order: of the epoch.
        division: of the samples among steps and processes.
        batched: whether a batch is made of a list of indices; else of one.
        first_step: the step from which on ``division`` holds, and
        first_sample: the number of the sample that it begins with. Both are 0 unless a run was
            resumed with another batch size within the epoch.
    """

    def __init__(
        self,
        order: IndexOrder,
        division: Division,
        batched: bool = True,
        first_step: int = 0,
        first_sample: int = 0,
    ) -> None:
        self._order = order
        self._division = division
        self._batched = batched
        self._first_step = first_step
        self._first_sample = first_sample
        self.steps = first_step + division.steps(len(order) - first_sample)

    def samples_before(self, step_id: int) -> int:
        return min(self._start_of(step_id), len(self._order))

    def sizes(self, step_id: int) -> Iterator[int]:
        rest = len(self._order) - self._first_sample
        return self._division.sizes(rest, step_id - self._first_step)

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        # Spelled out for full batches, since this is on the path of every step.
        division, order, samples = self._division, self._order, len(self._order)
        size, stride = division.batch_size, division.samples_per_step
        begin = self._start_of(step_id) + division.rank * size
        for batch_id in range(
            step_id * division.processes + division.rank,
            self.steps * division.processes,
            division.processes,
        ):
            if begin + size <= samples and self._batched:
                indices = order.indices_between(begin, begin + size)
                yield BatchIndices(batch_id, range(begin, begin + size), indices)
            else:
                yield self._batch(batch_id // division.processes)
            begin += stride

    def at_step(self, step_id: int) -> BatchIndices | None:
        return self._batch(step_id) if step_id < self.steps else None

    def _batch(self, step_id: int) -> BatchIndices:
        numbers = self._numbers(step_id)
        indices = self._order.indices(numbers)
        batch_id = step_id * self._division.processes + self._division.rank
        return BatchIndices(batch_id, numbers, indices if self._batched else indices[0])

    def _numbers(self, step_id: int) -> Sequence[int]:
        return self._division.numbers(len(self._order), self._start_of(step_id))

    def _start_of(self, step_id: int) -> int:
        return self._first_sample + (step_id - self._first_step) * self._division.samples_per_step


class IteratedBatches:
    """Batches of a sampler that is iterated, with random streams of its own.

    Args:
        batches: a batch sampler, or a sampler whose items each give a whole batch.
        division: the processes among which the batches are dealt out, and how many samples a
            batch has where that is known.
        samples: how many samples there are where that is known, and they are divided as
            ``division`` says.
        streams: what the sampler draws from.
        batched: whether a batch is made of a list of indices; else of one.
        split: whether each batch is cut into one for each process.
        progress: what the run has done.
    """

    def __init__(
        self,
        batches: Any,
        division: Division,
        samples: int | None,
        streams: ContinuedStreams,
        progress: TrainerProgress,
        batched: bool = True,
        split: bool = False,
    ) -> None:
        self._division = division
        self._samples = samples
        self._streams = streams
        self._progress = progress
        self._batched = batched
        self._given: deque[tuple[int, BatchIndices]] = deque()
        if division.processes > 1:
            batches = BatchSamplerShard(
                _Numbered(batches),
                division.processes,
                division.rank,
                split_batches=split,
                even_batches=division.even,
            )
        self._batches = batches
        self.steps = count_batches(batches)

    def samples_before(self, step_id: int) -> int | None:
        """How many samples of the whole job are done when a step begins; None: not known."""
        if self._samples is None:
            return None
        return min(step_id * self._division.samples_per_step, self._samples)

    def sizes(self, step_id: int) -> Iterator[int] | None:
        return None if self._samples is None else self._division.sizes(self._samples, step_id)

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        """The batches from a step on; the indices of those before are passed over."""
        self._given.clear()
        numbered = self._numbered()
        if step_id > 0:
            with self._streams:
                for _ in zip(range(step_id), numbered, strict=False):
                    self._streams.between()
        return self._under_streams(numbered, step_id)

    def at_step(self, step_id: int) -> BatchIndices | None:
        self._forget_before(step_id)
        return self._given[0][1] if self._given and self._given[0][0] == step_id else None

    def _forget_before(self, step_id: int) -> None:
        while self._given and self._given[0][0] < step_id:
            self._given.popleft()

    def _under_streams(
        self, numbered: Iterator[BatchIndices], step_id: int
    ) -> Iterator[BatchIndices]:
        for step in count(step_id):
            with self._streams:
                batch = next(numbered, None)
            if batch is None:
                return
            self._forget_before(self._progress.step_id)
            self._given.append((step, batch))
            yield batch

    def _numbered(self) -> Iterator[BatchIndices]:
        processes, rank = self._division.processes, self._division.rank
        begin = 0
        for step, batch in enumerate(self._batches):
            if processes > 1:
                numbers, indices = map(list, zip(*batch, strict=True))
                yield BatchIndices(step * processes + rank, numbers, indices)
            else:
                size = len(batch) if self._batched else 1
                yield BatchIndices(step, range(begin, begin + size), batch)
                begin += size


class _Numbered:
    """A batch sampler's batches, as lists of (number, index)."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        for name in ("batch_size", "drop_last"):
            if hasattr(batches, name):
                setattr(self, name, getattr(batches, name))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        numbers = count()
        for batch in self._batches:
            yield [(next(numbers), index) for index in batch]
