"""Accumulation windows: the micro-batches of each optimizer step, and their loss divisors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, repeat
from typing import Any, TypeAlias

import torch
import torch.distributed

from robo_orchard_lab.pipeline.batch_processor import count_samples
from robo_orchard_lab.pipeline.data import StepSizes
from robo_orchard_lab.pipeline.distributed.collectives import GatheredNumbers, broadcast_object
from robo_orchard_lab.pipeline.errors import DataError, StateError
from robo_orchard_lab.pipeline.isolation import isolated_rng
from robo_orchard_lab.pipeline.model import BufferSnapshot
from robo_orchard_lab.pipeline.state_schema import Count, Real, StateSchema
from robo_orchard_lab.pipeline.trainer.loss_weights import LossWeights

logger = logging.getLogger(__name__)

_NONE = -1  # size of a missing batch


@dataclass(slots=True)
class JointWindow:
    """Batches of this rank for one window, and the exchange of their sizes between ranks."""

    batches: list[Any]
    own: list[int]
    """Samples of each step on this rank; negative without a batch."""
    gathered: GatheredNumbers


@dataclass(eq=False)
class JointWindows:
    """Alignment of ranks with different batches, and different numbers of batches, in an epoch.

    Ranks exchange the sizes of their batches for each window, when all its batches are loaded. With
    ``ahead``, a window of one step is exchanged during the step before. The epoch ends when no rank
    has a batch. A rank without a batch runs a padding step with its last batch, or with a batch
    from another rank if it had none.
    """

    length: int
    """Steps in a full window."""
    count: Callable[[Any, StepSizes | None], int]
    """Function that counts the samples of a batch, given the step's sizes where known."""
    batches: Iterator[Any]
    """Remaining batches of this rank."""
    given: Iterator[StepSizes] | None
    """Sizes of these batches, where the data knows them."""
    lengths: Iterator[int]
    """Maximum number of steps in each window, the open one included."""
    ahead: bool
    """Load the batch of a window of one step before the update of the step before."""
    _padding: list[Any] = field(default_factory=list, init=False)
    """Batch for padding steps, if any."""

    def windows(
        self, begun: Sequence[StepSizes], within: int, from_start: bool
    ) -> Iterator[tuple[list[Any], list[StepSizes]]]:
        """Yield the remaining batches of each window, and all its sizes.

        The first ``within`` steps of an open window of the sizes ``begun`` are done.
        """
        window: JointWindow | None
        if within:
            next(self.lengths)
            rest = sum(sizes.local != _NONE for sizes in begun[within:])
            window = self._load(rest, skipped=within)
        else:
            window = self._next()
        while window is not None:
            sizes = self._agree(window, begun if within else (), within, from_start)
            if not sizes:
                return
            padding = self._padding
            ahead = self._next() if self.ahead else None
            yield window.batches + padding * (len(sizes) - within - len(window.batches)), sizes
            within = 0
            window = ahead or self._next()

    def _next(self) -> JointWindow | None:
        length = next(self.lengths, None)
        return None if length is None else self._load(length)

    def _load(self, count: int, skipped: int = 0) -> JointWindow:
        loaded, own = [], [_NONE] * self.length
        for step, batch in enumerate(islice(self.batches, count), start=skipped):
            loaded.append(batch)
            own[step] = self.count(batch, None if self.given is None else next(self.given))
        if loaded:
            self._padding = [loaded[-1]]
        return JointWindow(loaded, own, GatheredNumbers([*own, len(self._padding)]))

    def _agree(
        self, window: JointWindow, begun: Sequence[StepSizes], within: int, from_start: bool
    ) -> list[StepSizes]:
        """Return the sizes of the steps that any rank has a batch for."""
        rows = window.gathered.wait()
        steps = list(zip(*(row[:-1] for row in rows), strict=True))
        if begun:  # the totals were exchanged when the window began
            sizes = [
                StepSizes(own, size.total) for own, size in zip(window.own, begun, strict=False)
            ]
        else:
            sizes = [
                StepSizes(own, sum(size for size in step if size != _NONE))
                for own, step in zip(window.own, steps, strict=True)
                if max(step) != _NONE
            ]
        lacking = [not row[-1] for row in rows]
        if any(lacking) and sizes:
            source = next(rank for rank, size in enumerate(steps[within]) if size != _NONE)
            batch = broadcast_object(window.batches[0] if window.batches else None, source)
            if not self._padding:
                self._padding = [batch]
                if from_start:
                    _warn_without_data()
        return sizes


@cache
def _warn_without_data() -> None:
    logger.warning(
        "rank %d has no data while other ranks have: it runs padding steps; give every rank a "
        "part of the data",
        torch.distributed.get_rank(),
    )


@contextmanager
def padding_step(model: torch.nn.Module) -> Iterator[None]:
    """Run a padding step in the body: forward and backward without lasting effects.

    Gradients of the step are zeros, also for a NaN loss. Buffers, such as running statistics, and
    RNG states are restored afterwards, which costs a copy of the buffers and milliseconds.

    Two exceptions: ``SyncBatchNorm`` counts the padding batch in its statistics, and sharded
    parameters take the gradients as computed, which are zeros unless the batch yields NaN.
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


MicroBatch: TypeAlias = tuple[Any, bool, float]
"""Batch, True if it ends its window, and the divisor of its mean loss. With these divisors, the
accumulated gradients, averaged over ranks, are those of the mean over all samples of the window.
The divisor is infinite for a batch of weight 0, as in a padding step."""

_END = object()


def _check_plan(state: Mapping[str, Any]) -> None:
    local, total = state["loaded_sizes"], state["job_sizes"]
    if state["within"] > state["planned"] or len(local) != len(total):
        raise ValueError("expected no more batches than planned, with their sizes")
    batches, samples = state["skipped_batches"] or 0, state["skipped_samples"] or 0
    if batches > state["within"] or not 0 <= samples < math.inf:
        raise ValueError("expected no more skipped batches than batches, and a number of samples")
    if not all(size >= 0 for size in total) or not all(s >= 0 or s == _NONE for s in local):
        raise ValueError("expected sizes >= 0")


WINDOW_SCHEMA = StateSchema(
    optional=["skipped_batches", "skipped_samples"],
    then=_check_plan,
    skipped_batches=Count | None,
    skipped_samples=Real | None,
    within=Count,
    planned=Count,
    loaded_sizes=list[Real],
    job_sizes=list[Real],
    loss_weights=LossWeights.schema.type,
)


@dataclass(eq=False)
class AccumulationWindows:
    """Split of an epoch's batches into accumulation windows; the last window may be short.

    The loss of a batch is divided by ``samples of the window / samples of the batch``: n equal
    micro-batches divide each loss by n. So n micro-batches equal one batch n times as large, and
    batches of several ranks, whose gradients are averaged, equal one batch of all samples.

    If batch sizes are not known in advance, or ``count_samples`` is given, all batches of a window
    are loaded before its first step. If the batch sizes of other ranks are unknown, as for streams
    and with ``count_samples``, ranks exchange them, see :class:`JointWindows`.
    """

    length: int
    """Batches in a full window, >= 1, counted from the first batch of the epoch."""
    count_samples: Callable[[Any], int] | None
    """Function that counts the samples of a batch; None uses the data's sizes, or else the
    structure of batches."""
    processes: int
    """Number of ranks with different samples in a step."""
    ranks: int
    """World size."""
    weights: LossWeights
    loads_ahead: bool = True
    """True if a batch may be loaded before the update of the step before."""
    _within: int = field(default=0, init=False)
    """Batches of the open window that were yielded; 0 between two windows."""
    _planned: int = field(default=0, init=False)
    """Batches in the open window."""
    _loaded: list[StepSizes] = field(default_factory=list, init=False)
    """Sizes of the open window, if its batches were loaded in advance."""
    skipped_batches: int = field(default=0, init=False)
    """Batches of the open window that hooks skipped, on one rank."""
    _skipped_samples: float = field(default=0, init=False)
    _sizes: Sequence[StepSizes] = field(default=(), init=False)
    """Sizes of the window of the current batch."""
    _batch: int = field(default=0, init=False)
    """Index of the current batch in its window."""

    def micro_batches(
        self,
        batches: Iterator[Any],
        sizes: Callable[[int, bool], Iterator[StepSizes] | None],
        done: int,
        limit: int | None,
    ) -> Iterator[MicroBatch]:
        """Iterate over the remaining micro-batches of an epoch.

        Args:
            batches: remaining batches.
            sizes: returns the sample counts of the epoch's steps from a step on; None if unknown
                before the batch (``ahead=True``), or with the batch.
            done: batches of the epoch that are done, maybe within a window.
            limit: maximum number of batches in the epoch; an open window is completed in any case.
                None for no limit.

        Raises:
            DataError: while iterating, the number of batches differs from the number of sizes.
            StateError: the epoch continues within a window whose sizes were not saved.
        """
        if done == 0:  # drop a window that the epoch before has left open
            self._within, self._loaded = 0, []
            self.skipped_batches, self._skipped_samples = 0, 0
        within = self._within
        begun = done - within  # first batch of the open window, or of the next
        counted = self.count_samples is not None
        known = None if counted else sizes(begun, True)
        is_given = self.processes > 1 or (self.length > 1 and not counted)
        given = sizes(done, False) if is_given else None
        joint = self.ranks > 1 and (counted or (known is None and given is None))
        if self.length == 1 and not joint:  # in C, since most runs take this path in every step
            divisors = repeat(1.0) if given is None else map(self._own_divisor, given)
            return zip(batches, repeat(True), divisors)
        lengths = self._lengths(begun, limit)
        if known is not None:
            return self._sized_windows(batches, known, lengths, begun, limit)
        if within and not self._loaded:
            raise StateError(
                f"the run was saved after {within} of {self._planned} batches of an accumulation "
                "window whose batch sizes were known in advance, and now they are not; resume with "
                "the same kind of data loader and batch processor"
            )
        if joint:
            ahead = self.length == 1 and self.loads_ahead
            windows = JointWindows(self.length, self._own_size, batches, given, lengths, ahead)
            return self._joint_windows(windows, from_start=done == 0)
        return self._loaded_ahead(batches, given, lengths)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and the weights of the open window."""
        return {
            "within": self._within,
            "planned": self._planned,
            "loaded_sizes": [sizes.local for sizes in self._loaded],
            "job_sizes": [sizes.total for sizes in self._loaded],
            "loss_weights": self.weights.state_dict(),
            "skipped_batches": self.skipped_batches,
            "skipped_samples": float(self._skipped_samples),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise a ``StateError`` if :meth:`load_state_dict` can't load the state."""
        WINDOW_SCHEMA.check(state, "window")
        self.weights.check(state["loss_weights"])

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the open window."""
        self.weights.load_state_dict(state["loss_weights"], device)
        self._within, self._planned = state["within"], state["planned"]
        self._loaded = list(map(StepSizes, state["loaded_sizes"], state["job_sizes"]))
        self.skipped_batches = state.get("skipped_batches") or 0
        self._skipped_samples = state.get("skipped_samples") or 0

    def skip_batch(self) -> None:
        """Note that a hook skipped the current batch, on one rank."""
        self.skipped_batches += 1
        if self._sizes:
            self._skipped_samples += self._sizes[self._batch].local

    def end_skipped(self) -> tuple[float, float, bool]:
        """Reset the account of the window that ends with the current batch.

        Returns:
            Samples of skipped batches, samples of all batches, and True if no batch is left.
        """
        skipped, total = self._skipped_samples, sum(size.total for size in self._sizes)
        is_empty = self.skipped_batches >= max(1, len(self._sizes)) or skipped >= total
        self.skipped_batches, self._skipped_samples = 0, 0
        return skipped, total, is_empty

    def _own_divisor(self, sizes: StepSizes) -> float:
        """Return the divisor of a batch that is a window by itself."""
        return _divisor(sizes.local, sizes.total, self.processes)

    def _lengths(self, begun: int, limit: int | None) -> Iterator[int]:
        """Yield the lengths of the windows from batch ``begun`` on, up to the limit if any.

        The epoch may end before.
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
        """Yield windows whose sizes are known in advance."""
        for length in lengths:
            window = list(islice(sizes, length))
            if not window:
                break
            yield from self._window(
                islice(batches, len(window) - self._within), window, self.processes
            )
            if self._within:
                raise _wrong_length("fewer")
            begun += len(window)
        if begun != limit and next(batches, _END) is not _END:
            raise _wrong_length("more")

    def _loaded_ahead(
        self, batches: Iterator[Any], given: Iterator[StepSizes] | None, lengths: Iterator[int]
    ) -> Iterator[MicroBatch]:
        """Yield windows whose sizes are known when all batches are loaded."""
        for length in lengths:
            loaded = list(islice(batches, length - self._within))
            if not loaded:
                return
            if given is None:
                sizes = [StepSizes(size, size) for size in map(self._count, loaded)]
            else:
                sizes = list(islice(given, len(loaded)))
            self._loaded = [*self._loaded[: self._within], *sizes]
            yield from self._window(loaded, self._loaded, self.processes)

    def _joint_windows(self, windows: JointWindows, from_start: bool) -> Iterator[MicroBatch]:
        for loaded, sizes in windows.windows(self._loaded, self._within, from_start):
            self._loaded = sizes
            yield from self._window(loaded, sizes, self.ranks)

    def _window(
        self, batches: Iterable[Any], sizes: Sequence[StepSizes], processes: int
    ) -> Iterator[MicroBatch]:
        """Yield the remaining batches of one window of ``sizes``."""
        total = sum(size.total for size in sizes)
        divisors = [_divisor(size.local, total, processes) for size in sizes]
        self._planned, self._sizes = len(divisors), sizes
        for taken, batch in enumerate(batches, start=self._within + 1):
            ends = taken == len(divisors)
            if ends:
                self._within, self._loaded = 0, []
            else:
                self._within = taken
            self._batch = taken - 1
            yield batch, ends, divisors[taken - 1]

    def _count(self, batch: Any) -> int:
        return (self.count_samples or count_samples)(batch)

    def _own_size(self, batch: Any, sizes: StepSizes | None) -> int:
        is_padding = sizes is not None and sizes.local == 0
        return 0 if is_padding else self._count(batch)


def _divisor(own: float, total: float, processes: int) -> float:
    """Return the divisor of a mean loss over ``own`` of ``total`` samples."""
    return total / (own * processes) if own > 0 else math.inf


def _wrong_length(compared: str) -> DataError:
    return DataError(
        f"the dataloader yielded {compared} batches than the length of its sampler, from which "
        "accumulation windows are planned; correct the length, or define count_samples(batch) on "
        "the batch processor, which makes the trainer load and count windows instead"
    )
