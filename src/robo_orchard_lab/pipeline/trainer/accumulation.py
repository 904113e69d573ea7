"""Dividing a stream of batches into accumulation windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice, repeat
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from robo_orchard_lab.pipeline.batch_processor import first_length
from robo_orchard_lab.pipeline.data import StepSizes
from robo_orchard_lab.pipeline.errors import DataError, StateError
from robo_orchard_lab.pipeline.isolation import isolated_rng
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import BufferSnapshot
from robo_orchard_lab.pipeline.trainer.loss_weights import LossWeights
from robo_orchard_lab.pipeline.trainer.uneven_ranks import JointWindows

# --- filler ----------------------------------------------------------------------------------
# Taking part in a step with a batch that leaves nothing behind.


@contextmanager
def padding_step(model: torch.nn.Module) -> Iterator[None]:
    """A ``with`` whose body passes a filler through a model, forward and backward.

    It adds zeros to the gradients, also where the batch gives NaN. Afterwards the buffers, such as
    running statistics, and the random state are what they were. That takes a copy of the buffers,
    and milliseconds. Statistics that ranks join within the forward pass (``SyncBatchNorm``) do
    count the filler; parameters that are sharded take their gradients from it as they are, which
    are zeros unless the batch gives NaN.
    """
    buffers = BufferSnapshot()
    buffers.attach(model)
    buffers.save()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_hook(torch.zeros_like) for parameter in trained]
    try:
        with isolated_rng({}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        buffers.restore()


ItemT = TypeVar("ItemT")

MicroBatch: TypeAlias = tuple[Any, bool, float]
"""A batch; whether it ends its window; and what to divide its mean loss by, so that the gradients
that the window adds up, in the mean of all ranks, are those of the mean over all of its samples.
That is infinite for a batch that weighs nothing, such as a filler."""

_END = object()

logger = job_logger(__name__)


class SizesOfSteps(Protocol):
    """How many samples the steps of a pass have, from one of them on."""

    def __call__(self, step_id: int, *, ahead: bool) -> Iterator[StepSizes] | None:
        """None where that is not known ahead, or when the batch of the step was given."""
        ...


class AccumulationWindows:
    """Divides a pass over the batches into windows, the last of which may be short.

    A window of n equal batches divides each loss by n; of unequal ones, each by the window's
    samples over its own. So n micro-batches equal one batch n times as large, and those of several
    ranks, whose gradients are averaged, one batch of all their samples.

    Where the sizes of batches are not known ahead, or ``count_samples`` is given, a window's
    batches are all loaded before the first is given.

    Where the sizes of the other ranks' batches are not known at all, as of streams (but of lists
    as long on all ranks) and by ``count_samples``, :class:`JointWindows` has the ranks tell each
    other.

    Args:
        length: how many batches make a full window, >= 1; windows are counted from the first
            batch of the pass.
        count_samples: how many samples a batch has; None counts its first tensor's length.
        processes: how many have samples of their own in a step.
        ranks: how many there are in the job.
        weights: what losses weigh that come with a weight.
    """

    def __init__(
        self,
        length: int,
        count_samples: Callable[[Any], int] | None,
        processes: int,
        ranks: int,
        weights: LossWeights,
    ) -> None:
        self._weights = weights
        self.length = length
        self._count_samples = count_samples
        self._processes = processes
        self._ranks = ranks
        self._within = 0
        """How many batches of the open window are given; 0 between two windows."""
        self._planned = 0
        """How many batches the open window has."""
        self._loaded: list[StepSizes] = []
        """Of the open window, where its batches were loaded ahead."""

    def micro_batches(
        self, batches: Iterator[Any], sizes: SizesOfSteps, done: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        """What is left of a pass.

        Args:
            batches: those that are left.
            sizes: how many samples the steps of the pass have.
            done: how many batches of the pass are done, maybe within a window.
            limit: how many batches of the pass to take at most, or to the end of the window that
                is open; None takes all.

        Raises:
            DataError: while iterating, where there are more batches than sizes, or fewer.
            StateError: the pass goes on within a window of which the sizes were not saved.
        """
        if done == 0:  # whatever the pass before has left open
            self._within, self._loaded = 0, []
        within = self._within
        begun = done - within  # the first batch of the window that is open, or next
        counted = self._count_samples is not None
        known = None if counted else sizes(begun, ahead=True)
        given = sizes(done, ahead=False) if self._processes > 1 else None
        joint = self._ranks > 1 and (counted or (known is None and given is None))
        if self.length == 1 and not joint:  # in C, since this is every step of most runs
            divisors = repeat(1.0) if given is None else map(self._divisor, given)
            return zip(batches, repeat(True), divisors)
        lengths = self._lengths(begun, limit)
        if known is not None:
            return self._sized_windows(batches, known, lengths, begun, limit)
        if within and not self._loaded:
            raise StateError(
                f"the run was saved after {within} of the {self._planned} batches of an "
                "accumulation window whose sizes were known ahead, and now are not; resume it with "
                "the kind of data loader and batch processor that it was saved with"
            )
        if joint:
            return self._joint_windows(batches, given, lengths, from_start=done == 0)
        return self._loaded_ahead(batches, given, lengths)

    def state_dict(self) -> dict[str, Any]:
        """What the open window, if there is one, was planned by, and weighs so far."""
        return {
            "within": self._within,
            "planned": self._planned,
            "loaded_sizes": [sizes.local for sizes in self._loaded],
            "job_sizes": [sizes.total for sizes in self._loaded],
            "loss_weights": self._weights.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a window that can't be gone on with; raises ``StateError``, changes nothing."""
        self._weights.check(state["loss_weights"])

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on within a window as it was planned."""
        self._weights.load_state_dict(state["loss_weights"], device)
        self._within, self._planned = state["within"], state["planned"]
        self._loaded = list(map(StepSizes, state["loaded_sizes"], state["job_sizes"]))

    def _divisor(self, sizes: StepSizes) -> float:
        """Of a batch that is a window by itself."""
        return _divisor(sizes.local, sizes.total, self._processes)

    def _lengths(self, begun: int, limit: int | None) -> Iterator[int]:
        """How many batches the windows have from batch ``begun`` on, without end or up to a limit.

        The pass may be over before.
        """
        if self._within:
            yield self._planned
            begun += self._planned
        while limit is None or begun < limit:
            end = begun + self.length - begun % self.length
            end = end if limit is None else min(end, limit)
            yield end - begun
            begun = end

    def _sized_windows(
        self,
        batches: Iterator[Any],
        sizes: Iterator[StepSizes],
        lengths: Iterator[int],
        begun: int,
        limit: int | None,
    ) -> Iterator[MicroBatch]:
        """Windows of which the sizes are known ahead."""
        for window in _chunks(sizes, lengths):
            rest = islice(batches, len(window) - self._within)
            yield from self._window(rest, self._within, window, self._processes)
            if self._within:
                raise _wrong_length("fewer")
            begun += len(window)
        if begun != limit and next(batches, _END) is not _END:
            raise _wrong_length("more")

    def _loaded_ahead(
        self, batches: Iterator[Any], given: Iterator[StepSizes] | None, lengths: Iterator[int]
    ) -> Iterator[MicroBatch]:
        """Windows of which the sizes are known when all batches are loaded."""
        for length in lengths:
            within, done = self._within, self._loaded[: self._within]
            loaded = list(islice(batches, length - within))
            if not loaded:
                return
            if given is None:
                sizes = [StepSizes(size, size) for size in map(self._count, loaded)]
            else:
                sizes = list(islice(given, len(loaded)))
            self._loaded = [*done, *sizes]
            yield from self._window(loaded, within, self._loaded, self._processes)

    def _joint_windows(
        self,
        batches: Iterator[Any],
        given: Iterator[StepSizes] | None,
        lengths: Iterator[int],
        from_start: bool,
    ) -> Iterator[MicroBatch]:
        """Windows of which the ranks tell each other."""
        joint = JointWindows(self.length, self._own_size)
        begun, within = self._loaded, self._within
        for loaded, sizes in joint.windows(batches, given, lengths, begun, within, from_start):
            self._loaded = sizes
            yield from self._window(loaded, self._within, sizes, self._ranks)

    def _window(
        self, batches: Iterable[Any], within: int, sizes: Sequence[StepSizes], processes: int
    ) -> Iterator[MicroBatch]:
        """The batches of a window of such sizes that come after so many others."""
        divisors = _divisors(sizes, processes)
        self._planned = len(divisors)
        for taken, batch in enumerate(batches, start=within + 1):
            ends = taken == len(divisors)
            if ends:
                self._within, self._loaded = 0, []
            else:
                self._within = taken
            yield batch, ends, divisors[taken - 1]

    def _count(self, batch: Any) -> int:
        return (self._count_samples or _count)(batch)

    def _own_size(self, batch: Any, sizes: StepSizes | None) -> int:
        filler = sizes is not None and sizes.local == 0
        return 0 if filler else self._count(batch)


def _divisor(own: float, total: float, processes: int) -> float:
    """What makes the mean of the ranks' gradients that over so many samples."""
    return total / (own * processes) if own > 0 else math.inf


def _divisors(window: Sequence[StepSizes], processes: int) -> list[float]:
    total = sum(sizes.total for sizes in window)
    return [_divisor(sizes.local, total, processes) for sizes in window]


def _chunks(items: Iterator[ItemT], lengths: Iterator[int]) -> Iterator[list[ItemT]]:
    """Lists of so many items each, the last of which may be shorter."""
    for length in lengths:
        chunk = list(islice(items, length))
        if not chunk:
            return
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
