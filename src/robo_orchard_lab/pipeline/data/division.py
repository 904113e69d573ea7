"""Which samples of an epoch's order are a process's, in each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat


@dataclass(frozen=True, slots=True)
class Division:
    """Batches that follow each other in the order, dealt out to the processes in turn.

    With several processes this gives what Accelerate's ``BatchSamplerShard`` gives: where the last
    batches are not full, ``even`` completes them with samples from the beginning, so that each
    process has as many batches, all of them full. One process has a shorter last batch.
    """

    batch_size: int
    """Of one process."""
    drop_last: bool = False
    processes: int = 1
    rank: int = 0
    even: bool = True

    @property
    def samples_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.processes

    def steps(self, samples: int) -> int:
        """How many batches this process has of so many samples of the whole job."""
        full, rest = divmod(samples, self.samples_per_step)
        if rest == 0 or self.drop_last:
            return full
        own = self.processes == 1 or self.even or rest > self.rank * self.batch_size
        return full + 1 if own else full

    def sizes(self, samples: int, step_id: int) -> Iterator[int]:
        """How many samples this process's batches have from a step on."""
        steps = self.steps(samples)
        if step_id >= steps:
            return iter(())
        last = len(self.numbers(samples, (steps - 1) * self.samples_per_step))
        return chain(repeat(self.batch_size, steps - 1 - step_id), [last])

    def numbers(self, samples: int, start: int) -> Sequence[int]:
        """Those of this process's batch in the step that begins with sample ``start``."""
        begin = start + self.rank * self.batch_size
        end = begin + self.batch_size
        if end <= samples:
            return range(begin, end)
        if self.processes == 1 or not self.even:
            return range(begin, samples)
        period = min(samples, self.samples_per_step)
        return [
            number if number < samples else (number - samples) % period
            for number in range(begin, end)
        ]
