"""Interleaved timing: contenders take turns, and are compared turn by turn.

A shared machine drifts: its clock, its caches and its neighbours change over seconds. So every
round runs each contender once, one after the other (A B C, A B C, ...), a ratio is taken only
between two runs of one round, and what is reported is the median of those ratios with the middle
half of them as its spread.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import median, quantiles
from time import perf_counter_ns


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some samples, and the range that holds the middle half of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), low, high)


def interleave(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int
) -> dict[str, list[float]]:
    """One sample of every contender a round, in the order given.

    The first round is run and thrown away: it pays for imports, caches and lazy set-up.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_id in range(rounds + 1):
        for name, measure in contenders.items():
            gc.collect()  # so that nobody pays for the garbage of the one before
            sample = measure()
            if round_id > 0:
                samples[name].append(sample)
    return samples


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each sample divided by the reference's sample of the same round."""
    return [ours / theirs for ours, theirs in zip(samples, reference, strict=True)]


def differences(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """What each sample costs more than the reference's sample of the same round."""
    return [ours - theirs for ours, theirs in zip(samples, reference, strict=True)]


def ns_per_call(call: Callable[[], object], *, calls: int) -> float:
    """The mean time of `calls` calls in a row, the bare `for` around them (some 10 ns) included."""
    turns = repeat(None, calls)
    start = perf_counter_ns()
    for _ in turns:
        call()
    return (perf_counter_ns() - start) / calls
