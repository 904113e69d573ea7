"""Which samples of an epoch's order are a process's, in each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple


class StepSizes(NamedTuple):
    """How many samples a step has, or another weight of them."""

    own: float
    """Of this process; 0 where it takes part in the step with a filler."""
    job: float
    """Of all processes together."""


@dataclass(frozen=True, slots=True)
class Division:
    """Steps that follow each other in the order, each cut into one batch for each process.

    A step has as many samples as one process with a batch that many times as large would take; the
    first process has the first of them. The last step, where samples are left for no full one, is
    cut as evenly as can be: nothing is repeated, and a process may have none of it. With
    ``drop_last`` there is no such step.
    """

    batch_size: int
    """Of one process."""
    drop_last: bool = False
    processes: int = 1
    rank: int = 0

    @property
    def samples_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.processes

    def steps(self, samples: int) -> int:
        """How many there are with so many samples; the same for all processes."""
        full, rest = divmod(samples, self.samples_per_step)
        return full + 1 if rest and not self.drop_last else full

    def sizes(self, samples: int, step_id: int) -> Iterator[StepSizes]:
        """How many samples the steps have, from one of them on."""
        steps = self.steps(samples)
        if step_id >= steps:
            return iter(())
        full = StepSizes(self.batch_size, self.samples_per_step)
        start = (steps - 1) * self.samples_per_step
        last = StepSizes(
            len(self.numbers(samples, start)), min(samples - start, self.samples_per_step)
        )
        return chain(repeat(full, steps - 1 - step_id), [last])

    def numbers(self, samples: int, start: int) -> range:
        """Those of this process in the step that begins with sample ``start``."""
        in_step = min(samples - start, self.samples_per_step)
        share = even_share(in_step, self.processes, self.rank)
        return range(start + share.start, start + share.stop)


def even_share(items: int, processes: int, rank: int) -> range:
    """Which of so many items are one process's, where each has as many as the others or one less.

    >>> [even_share(5, 3, rank) for rank in range(3)]
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    each, more = divmod(items, processes)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))
