"""Interleaved timing: contenders take turns, and each is compared with its neighbour in time.

A shared machine drifts: its clock, its caches and its neighbours change over seconds. So the
reference runs just before each of the others (A B, A C, A D, then the next round), a ratio is
taken only between two such neighbours, and what is reported is the median of those ratios with
the middle half of them as its spread.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import median, quantiles
from time import perf_counter, perf_counter_ns


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


@dataclass(frozen=True, slots=True)
class Samples:
    """What interleaved runs gave, by contender: one sample a round."""

    values: Mapping[str, Sequence[float]]
    """Of the reference, the samples of all its runs."""
    references: Mapping[str, Sequence[float]]
    """What the reference gave just before each sample; the reference has none of its own."""

    def overheads(self, name: str) -> list[float]:
        """What each sample costs more than the reference just before it."""
        return differences(self.values[name], self.references[name])


LEAST_ROUNDS = 3


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    *,
    reference: str,
    rounds: int,
    at_most_s: float = 120.0,
    warm_up: bool = True,
) -> Samples:
    """Runs every contender once a round, in the order given, each just after the reference.

    One more round is run before and thrown away, unless `warm_up` is False: it pays for imports,
    caches and lazy set-up. On a slow machine it stops early, after the round in which it has taken
    `at_most_s` seconds, but not before the third.
    """
    stop_at = perf_counter() + at_most_s
    values: dict[str, list[float]] = {name: [] for name in contenders}
    references: dict[str, list[float]] = {name: [] for name in contenders if name != reference}
    gc.collect()
    gc.freeze()  # else every collection below walks all that was imported: 0.1-0.3 s a run
    for round_id in range(0 if warm_up else 1, rounds + 1):
        for name in references:
            before = _one_sample(contenders[reference])
            sample = _one_sample(contenders[name])
            if round_id > 0:
                values[reference].append(before)
                references[name].append(before)
                values[name].append(sample)
        if round_id >= LEAST_ROUNDS and perf_counter() > stop_at:
            break
    gc.unfreeze()
    return Samples(values, references)


def _one_sample(measure: Callable[[], float]) -> float:
    gc.collect()  # so that nobody pays for the garbage of the one before
    return measure()


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each sample divided by the reference's that belongs to it."""
    return [ours / theirs for ours, theirs in zip(samples, reference, strict=True)]


def differences(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each sample less the reference's that belongs to it."""
    return [ours - theirs for ours, theirs in zip(samples, reference, strict=True)]


def ns_per_call(call: Callable[[], object], *, calls: int, blocks: int = 20) -> float:
    """The time of one call, the bare `for` around it (some 10 ns) included.

    The lower quartile over `blocks` blocks of `calls` calls: a process that takes the core for its
    turn only ever adds time.
    """
    means = []
    for _ in range(blocks):
        turns = repeat(None, calls)
        start = perf_counter_ns()
        for _ in turns:
            call()
        means.append((perf_counter_ns() - start) / calls)
    return quantiles(means, n=4, method="inclusive")[0]
