"""The batches of one epoch: which samples each is made of, by position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, islice
from typing import Any, NamedTuple, Protocol

from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.order import IndexOrder, StepPartition, StepSizes, split_evenly
from robo_orchard_lab.pipeline.data.rng import PersistentRng
from robo_orchard_lab.pipeline.progress import TrainerProgress


class BatchIndices(NamedTuple):
    """What one process's batch of a step is loaded from."""

    batch_id: int
    """Among those of all processes in the epoch, from 0."""
    numbers: Sequence[int]
    """Of its samples in the order of the epoch, from 0."""
    indices: Any
    """Of its samples in the dataset."""
    sizes: StepSizes | None = None
    """Of the step, where they come with the batch. A batch that is no part of the process's share,
    which is 0 then, is a filler."""

    @property
    def is_padding_step(self) -> bool:
        """Whether the process has no share in the step; what it loads is another's."""
        return self.sizes is not None and self.sizes.local == 0


class EpochBatches(Protocol):
    """One pass over the batches of this process."""

    @property
    def steps(self) -> int | None:
        """How many there are; None where only passing over them tells."""
        ...

    def samples_before(self, step_id: int) -> int | None:
        """How many samples of the whole job are done when a step begins; None: not known."""
        ...

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        """How many samples the steps have from one on; None where that is not known.

        ``ahead``, or of each step when its batch was given.
        """
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
        division: StepPartition,
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

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes]:
        rest = len(self._order) - self._first_sample
        return self._division.sizes(rest, step_id - self._first_step)

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        # Spelled out for full batches, since this is on the path of every step.
        division, order, samples = self._division, self._order, len(self._order)
        size, stride = division.batch_size, division.samples_per_step
        begin = self._start_of(step_id) + division.rank * size
        last_full = samples - stride + division.rank * size
        for batch_id in range(
            step_id * division.processes + division.rank,
            self.steps * division.processes,
            division.processes,
        ):
            if begin <= last_full and self._batched:
                indices = order.indices_between(begin, begin + size)
                yield BatchIndices(batch_id, range(begin, begin + size), indices)
            else:
                yield self._batch(batch_id // division.processes)
            begin += stride

    def at_step(self, step_id: int) -> BatchIndices | None:
        return self._batch(step_id) if step_id < self.steps else None

    def _batch(self, step_id: int) -> BatchIndices:
        division, samples, start = self._division, len(self._order), self._start_of(step_id)
        numbers = division.numbers(samples, start)
        sizes = StepSizes(len(numbers), min(samples - start, division.samples_per_step))
        if not numbers:
            numbers = range(start, start + 1)
        indices = self._order.indices(numbers)
        batch_id = step_id * division.processes + division.rank
        return BatchIndices(batch_id, numbers, indices if self._batched else indices[0], sizes)

    def _start_of(self, step_id: int) -> int:
        return self._first_sample + (step_id - self._first_step) * self._division.samples_per_step


class IteratedBatches:
    """Batches of a sampler that is iterated, with random streams of its own.

    Those of torch's ``BatchSampler``, as many as there are processes, are put together to a step,
    of which each process has its even share; so are those that are to be split. Others are dealt
    out as they are. A process that has no share in the last step loads what another one has.

    Args:
        batches: a batch sampler, or a sampler whose items each give a whole batch.
        division: the processes among which the batches are divided, and how many samples a
            batch has where that is known.
        samples: how many samples there are where that is known, and they are divided as
            ``division`` says.
        streams: what the sampler draws from.
        batched: whether a batch is made of a list of indices; else of one.
        joined: whether a step is one list of indices, of which each process has a part; else each
            process has a batch of its own.
        split: whether a step is made of one batch; else of one for each process.
        progress: what the run has done.
    """

    def __init__(
        self,
        batches: Any,
        division: StepPartition,
        samples: int | None,
        streams: PersistentRng,
        progress: TrainerProgress,
        *,
        batched: bool = True,
        joined: bool = False,
        split: bool = False,
    ) -> None:
        self._batches = batches
        self._division = division
        self._samples = samples
        self._streams = streams
        self._progress = progress
        self._batched = batched
        self._joined = joined or split
        self._drops_last = division.drop_last and joined and not split
        self._batches_per_step = 1 if split else division.processes
        self._given: deque[tuple[int, BatchIndices]] = deque()
        self.steps = self._count_steps()

    def _count_steps(self) -> int | None:
        if self._samples is not None:
            return self._division.steps(self._samples)
        batches = count_batches(self._batches)
        if batches is None:
            return None
        full, rest = divmod(batches, self._batches_per_step)
        return full + 1 if rest and not self._drops_last else full

    def samples_before(self, step_id: int) -> int | None:
        """How many samples of the whole job are done when a step begins; None: not known."""
        if self._samples is None:
            return None
        return min(step_id * self._division.samples_per_step, self._samples)

    def sizes(self, step_id: int, ahead: bool) -> Iterator[StepSizes] | None:
        if not ahead and self._division.processes > 1:
            return map(self._given_sizes, count(step_id))
        return None if self._samples is None else self._division.sizes(self._samples, step_id)

    def _given_sizes(self, step_id: int) -> StepSizes:
        batch = self.at_step(step_id)
        assert batch is not None  # since it was given
        assert batch.sizes is not None
        return batch.sizes

    def from_step(self, step_id: int) -> Iterator[BatchIndices]:
        """The batches from a step on; the indices of those before are passed over."""
        self._given.clear()
        numbered = self._numbered()
        if step_id > 0:
            with self._streams:
                for _ in zip(range(step_id), numbered, strict=False):
                    self._streams.drop_cached_gaussian()
        return self._under_streams(numbered, step_id)

    def at_step(self, step_id: int) -> BatchIndices | None:
        self._forget_before(self._progress.step_id)
        for step, batch in self._given:
            if step == step_id:
                return batch
        return None

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
        if self._division.processes > 1:
            yield from self._shares()
            return
        begin = 0
        for step, batch in enumerate(self._batches):
            size = len(batch) if self._batched else 1
            yield BatchIndices(step, range(begin, begin + size), batch)
            begin += size

    def _shares(self) -> Iterator[BatchIndices]:
        """This process's of each step, where there are several."""
        processes, rank = self._division.processes, self._division.rank
        batches, begin = iter(self._batches), 0
        for step in count():
            in_step = [self._listed(batch) for batch in islice(batches, self._batches_per_step)]
            indices = [index for batch in in_step for index in batch]
            total = len(indices)
            if not in_step or (self._drops_last and total < self._division.samples_per_step):
                return
            if self._joined:
                own = split_evenly(total, processes, rank)
                filler = range(1)
            else:
                ends = [0, *accumulate(map(len, in_step))]
                own = range(*ends[rank : rank + 2]) if rank < len(in_step) else range(0)
                filler = range(ends[1])
            loaded = own or filler
            picked = indices[loaded.start : loaded.stop]
            yield BatchIndices(
                step * processes + rank,
                range(begin + loaded.start, begin + loaded.stop),
                picked if self._batched else picked[0],
                StepSizes(len(own), total),
            )
            begin += total

    def _listed(self, batch: Any) -> list[Any]:
        return list(batch) if self._batched else [batch]
