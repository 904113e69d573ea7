"""Interleaved timing: contenders take turns, and each is compared with its neighbour in time.

A shared machine drifts: its clock, caches and other processes change over seconds. So the reference
runs just before each contender (A B, A C, A D, then the next round), and a ratio is taken only
between two neighbours. The report has the median of these ratios with their middle half as the
spread.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import median, quantiles
from time import perf_counter, perf_counter_ns


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of samples, with the range of their middle half."""

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
    """Samples of interleaved runs by contender, one per round."""

    values: Mapping[str, Sequence[float]]
    """Of the reference, the samples of all its runs."""
    references: Mapping[str, Sequence[float]]
    """Reference samples just before each sample; empty for the reference itself."""

    def overheads(self, name: str) -> list[float]:
        """Return the difference of each sample to the reference just before."""
        return differences(self.values[name], self.references[name])


LEAST_ROUNDS = 3


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    *,
    reference: str,
    rounds: int,
    at_most_s: float = 120.0,
    warm_up: bool = True,
    shared_by: int = 1,
) -> Samples:
    """Run every contender once per round, in order, each just after the reference.

    With `shared_by`, a run of the reference serves this many contenders.

    One more round is run before and discarded, unless `warm_up` is False: it covers imports, caches
    and lazy set-up. A slow machine stops after the round that exceeds `at_most_s` seconds, but not
    before the third.
    """
    stop_at = perf_counter() + at_most_s
    values: dict[str, list[float]] = {name: [] for name in contenders}
    references: dict[str, list[float]] = {name: [] for name in contenders if name != reference}
    before = 0.0
    gc.collect()
    gc.freeze()  # else each later collection walks all imports: 0.1-0.3 s per run
    for round_id in range(0 if warm_up else 1, rounds + 1):
        for position, name in enumerate(references):
            is_shared = position % shared_by != 0
            before = before if is_shared else _one_sample(contenders[reference])
            sample = _one_sample(contenders[name])
            if round_id > 0:
                values[reference] += [] if is_shared else [before]
                references[name].append(before)
                values[name].append(sample)
        if round_id >= LEAST_ROUNDS and perf_counter() > stop_at:
            break
    gc.unfreeze()
    return Samples(values, references)


def _one_sample(measure: Callable[[], float]) -> float:
    gc.collect()  # so that no contender pays for another's garbage
    return measure()


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return each sample divided by its reference's sample."""
    return [ours / theirs for ours, theirs in zip(samples, reference, strict=True)]


def differences(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return each sample minus its reference's sample."""
    return [ours - theirs for ours, theirs in zip(samples, reference, strict=True)]


def ns_per_call(call: Callable[[], object], *, calls: int, blocks: int = 20) -> float:
    """Return the time of one call, including the bare `for` loop (about 10 ns).

    The figure is the lower quartile over `blocks` blocks of `calls` calls: other processes on the
    core only ever add time.
    """
    means = []
    for _ in range(blocks):
        turns = repeat(None, calls)
        start = perf_counter_ns()
        for _ in turns:
            call()
        means.append((perf_counter_ns() - start) / calls)
    return quantiles(means, n=4, method="inclusive")[0]
