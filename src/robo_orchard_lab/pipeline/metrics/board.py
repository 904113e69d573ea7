"""MetricsBoard: named scalars, published by hooks and read at logging points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol, TypeAlias

import torch

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.distributed.collectives import join_by_rank
from robo_orchard_lab.pipeline.errors import UnknownMetricError
from robo_orchard_lab.pipeline.metrics.accumulators import (
    REDUCTIONS,
    Accumulator,
    MetricsRecord,
    MetricValue,
    Number,
    Reduction,
    WeightedSum,
    check_scalar,
)
from robo_orchard_lab.pipeline.metrics.exchange import DeferredMetrics, RankGather, read_values
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.state_schema import (
    Count,
    Flag,
    Real,
    Scalar,
    StateSchema,
    Text,
    mapping_of,
)

Subscriber: TypeAlias = Callable[[MetricValue], Any]
Listener: TypeAlias = Callable[[MetricsRecord], Any]

STATE_VERSION = 2
_EVALUATION_PREFIX = "eval/"
_NUMBER_TYPES = (float, int)
_NO_LOGGING_POINTS = (
    "Some hooks publish only at logging points, and no hook requests one; register a MetricsLogger"
)


def _check_values(window: Mapping[str, Any]) -> None:
    schema = WeightedSum.schema if window["reduce"] in ("mean", "sum") else _EXTREME
    schema.check(window["values"], "values")


_EXTREME = StateSchema(host=Real | None, tensor=Scalar | None)
_WINDOW = StateSchema(
    then=_check_values,
    reduce=Reduction,
    step=Count,
    latest=Real | torch.Tensor,
    weighted=Flag,
    values=dict[str, Any],
)
_VALUE = tuple[Text, Real, Count]
_SCHEMA = StateSchema(
    STATE_VERSION,
    optional=["writers"],  # older releases have none
    windows=mapping_of(_WINDOW),
    reductions=dict[str, Reduction],
    found=list[_VALUE],
    unlogged=list[_VALUE],
    writers=dict[str, dict[str, Any]],
)


class Stateful(Protocol):
    """Object with a saved state, for example a hook."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class MetricsBoard:
    """Named scalars, published by hooks and reduced at logging points.

    Published values accumulate on the host or on their device. Nothing is read before a *logging
    point*: then all values travel in one device-to-host copy and, with several ranks, one
    all_gather, and every rank has the values of all ranks. The trainer makes a logging point at the
    commit point where a hook requested one (``args.requests.log``). Only metrics with a subscriber
    are read before: at the commit point of the step that published them.

    >>> board = MetricsBoard()
    >>> board.publish("loss", 1.0, weight=8)
    >>> board.publish("loss", torch.tensor(4.0), weight=4)
    >>> board.flush(log=True).values
    (MetricValue(name='loss', value=2.0, step=0),)

    Args:
        progress: counters of the run; define the step of each value.
        when_due: called when a hook publishes a metric that has a subscriber, to request the
            commit point that reads the metric.
    """

    def __init__(
        self, progress: TrainerProgress | None = None, when_due: Callable[[], Any] = lambda: None
    ) -> None:
        self._progress = TrainerProgress() if progress is None else progress
        self._when_due = when_due
        self._due: set[str] = set()  # published names with a subscriber
        self._accumulators: dict[str, Accumulator] = {}
        self._reductions: dict[str, Reduction] = {}  # of every name published so far
        self._last_values: dict[str, MetricValue] = {}
        self._deferred: list[tuple[DeferredMetrics, int]] = []
        self._partial_names: set[str] = set()  # names in partial records
        self._unlogged: list[MetricValue] = []  # values read before their logging point
        self._subscribers: list[tuple[str, Subscriber, str]] = []
        self._expected: list[tuple[str, str]] = []
        self._listeners: list[Listener] = []
        self._collectors: list[tuple[Callable[[], Any], Stateful | None]] = []
        self._gather = RankGather()
        self._writers: dict[str, Callable[[], dict[str, Any]]] = {}
        self._writer_states: dict[str, dict[str, Any]] = {}  # of the resumed run

    # --- publish -----------------------------------------------------------------------------

    def publish(
        self, name: str, value: Number, reduce: Reduction = "mean", weight: Number | None = None
    ) -> None:
        """Accumulate a value of a metric until the next logging point; no device sync.

        A metric with a subscriber is read at the commit point of this step already.

        Args:
            name: by convention ``loss/<name>``, ``lr/group<i>``, ``perf/*`` or ``eval/*``.
            value: a number, or a tensor of one element of any dtype and device. The tensor may be
                changed afterwards.
            reduce: reduction over the ranks, and over the steps since the metric was last read.
                ``last`` uses the first rank with a value.
            weight: weight of the value in a mean, >= 0, such as the number of samples; default 1.

        Raises:
            MetricValueError: the value is not a single real number.
            ValueError: the name was published with another ``reduce``, the reduction is unknown, or
                the weight is negative or not for a mean.
        """
        if type(value) not in _NUMBER_TYPES and not (
            isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()
        ):
            value = check_scalar(name, value)
        is_weighted = weight is not None
        if weight is None:
            weight = 1.0
        elif type(weight) not in _NUMBER_TYPES or reduce != "mean" or not weight >= 0:
            weight = _check_weight(name, weight, reduce)
        accumulator = self._accumulators.get(name)
        if accumulator is None or accumulator.reduce != reduce:
            accumulator = self._open(name, reduce)
            accumulator.is_weighted = is_weighted
        accumulator.add(value, weight)
        accumulator.latest = value.detach() if isinstance(value, torch.Tensor) else value
        accumulator.step = self._progress.steps_done

    def publish_total(self, name: str, total: WeightedSum) -> None:
        """Accumulate a weighted sum of a metric with ``reduce="mean"``.

        The board owns ``total`` afterwards; the caller must start a new sum.
        """
        accumulator = self._accumulators.get(name) or self._open(name, "mean")
        if accumulator.reduce != "mean":
            raise ValueError(f"metric {name!r} is published with reduce={accumulator.reduce!r}")
        accumulator.add_sum(total)
        accumulator.is_weighted = True
        accumulator.step = self._progress.steps_done
        if total.host_weight and total.tensor is None:
            accumulator.latest = total.host / total.host_weight

    def publish_all(self, other: MetricsBoard) -> None:
        """Move the accumulated values of another board to this one."""
        for name, accumulator in other._accumulators.items():
            own = self._accumulators.get(name) or self._open(name, accumulator.reduce)
            own.merge(accumulator)
            own.is_weighted, own.latest = accumulator.is_weighted, accumulator.latest
            own.step = self._progress.steps_done
        other._accumulators = {}

    def defer(self, metrics: DeferredMetrics) -> None:
        """Publish metrics to compute from tensors at the next logging point.

        If a hook subscribed to one of the metrics, they are computed at the commit point of this
        step; if no hook listens to logging points, at the next commit point with a request, at the
        latest after the epoch.
        """
        self._deferred.append((metrics, self._progress.steps_done))
        if self._has_subscriber(metrics):
            self._when_due()

    # --- subscribe ---------------------------------------------------------------------------

    def subscribe(self, name: str, callback: Subscriber, who: str = "") -> RemovableHandle:
        """Call a function with every new value of a metric; subscribe on every rank.

        The metric is read, and the function called, at the commit point of the step that publishes
        the metric: the current weights are those of the value. ``mean``, ``sum``, ``max`` and
        ``min`` cover the values of this step on all ranks, and ``last`` is the last value of the
        first rank with a value. The next record has the value of each such step.

        Each publishing step costs a device-to-host copy and, with several ranks, a collective.
        To subscribe to a mean over many steps, publish the mean, or accumulate the values and
        publish them from :meth:`before_logging`. Every rank must publish the metric at the same
        steps; ranks without a value pass ``weight=0``.

        Args:
            name: name of the metric.
            callback: called with each :class:`MetricValue`, in step order.
            who: name of the subscriber, for the error if no hook publishes the metric.
        """
        entry = (name, callback, who)
        self._subscribers.append(entry)
        return RemovableHandle(lambda: self._subscribers.remove(entry))

    def expect(self, name: str, who: str) -> RemovableHandle:
        """Require a metric to be published, as :meth:`subscribe` does."""
        entry = (name, who)
        self._expected.append(entry)
        return RemovableHandle(lambda: self._expected.remove(entry))

    def listen(self, callback: Listener) -> RemovableHandle:
        """Call a function with the record of every logging point; listen on every rank."""
        self._listeners.append(callback)
        return RemovableHandle(lambda: self._listeners.remove(callback))

    def add_writer(self, name: str, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Save the state of a hook that writes records with the board's own.

        A hook's own state would refuse to resume a run after the hook was added or removed.

        Args:
            name: name of the hook.
            state: returns the state, as :meth:`PipelineHooks.state_dict` does.

        Returns:
            The state in the resumed checkpoint; empty otherwise.
        """
        self._writers[name] = state
        return self._writer_states.pop(name, {})

    def before_logging(
        self, callback: Callable[[], Any], owner: Stateful | None = None
    ) -> RemovableHandle:
        """Call a function before every logging point, to publish accumulated values.

        Args:
            callback: publishes values and resets its own accumulation.
            owner: state of the accumulation, restored after :meth:`flush_partial`.
        """
        entry = (callback, owner)
        self._collectors.append(entry)
        return RemovableHandle(lambda: self._collectors.remove(entry))

    # --- read --------------------------------------------------------------------------------

    def latest(self, name: str) -> float:
        """Return the value of the last logging point, or else this rank's latest value.

        A value on a device costs a device sync if no logging point has read the metric yet.

        Raises:
            UnknownMetricError: the name was never published; the message lists published names.
        """
        found = self._last_values.get(name)
        if found is not None:
            return found.value
        accumulator = self._accumulators.get(name)
        if accumulator is None:
            raise UnknownMetricError(name, self.names())
        return float(accumulator.latest)

    def newest(self, name: str) -> Number | None:
        """Return this rank's latest value since the last logging point as published, or None."""
        accumulator = self._accumulators.get(name)
        return None if accumulator is None else accumulator.latest

    def last_value(self, name: str) -> float | None:
        """Return the value of the last logging point or evaluation, or None."""
        found = self._last_values.get(name)
        return None if found is None else found.value

    def last_values(self) -> list[MetricValue]:
        """Return the value of each metric at its last logging point or evaluation."""
        return list(self._last_values.values())

    def values_at(self, step: int) -> dict[str, float]:
        """Return the finite values that were measured after so many steps, by name."""
        return {
            found.name: found.value
            for found in self.last_values()
            if found.step == step and math.isfinite(found.value)
        }

    def names(self) -> list[str]:
        """Return the published names, in order of first publication."""
        return list(self._reductions | dict.fromkeys(self._last_values))

    @property
    def is_logged(self) -> bool:
        """Return True if a hook listens to logging points."""
        return bool(self._listeners)

    def expected_names(self) -> list[tuple[str, str]]:
        """Return each name that a hook subscribed to or expects, and the name of the hook."""
        return [*((name, who) for name, _, who in self._subscribers), *self._expected]

    def find_missing(self, at_end: bool = True) -> UnknownMetricError | None:
        """Return the error for an expected but unpublished name, or None.

        Args:
            at_end: False ignores names that may still be published: names of evaluations, and all
                names before the first logging point.
        """
        known = {*self.names(), *self._partial_names}
        for name, who in self.expected_names():
            if name not in known and (
                at_end or (self._last_values and not name.startswith(_EVALUATION_PREFIX))
            ):
                hint = "" if self._listeners or not self._collectors else _NO_LOGGING_POINTS
                return UnknownMetricError(name, known, who, hint)
        return None

    def find_unwritten(self, evaluations: Iterable[str]) -> str | None:
        """Return a warning about hooks that publish metrics in a run that writes none, or None.

        Args:
            evaluations: names of hooks that evaluate. Their values reach subscribers without
                logging points, so the hooks count only if no hook subscribes.
        """
        names = [getattr(owner, "name", "") for _, owner in self._collectors]
        if not self.expected_names():
            names += evaluations
        who = ", ".join(dict.fromkeys(filter(None, names)))
        if self.is_logged or not who:
            return None
        return (
            f"no hook writes the metrics that {who} will publish; add "
            "MetricsLoggerConfig(every='50 steps | 1 epoch', sinks=[LogSinkConfig()]) to the hooks"
        )

    # --- flush -------------------------------------------------------------------------------

    def has_due_metrics(self) -> bool:
        """Return True if the next commit point must read metrics; identical on all ranks.

        Metrics without a subscriber otherwise wait for the logging point.
        """
        return bool(self._due) or any(self._is_due(metrics) for metrics, _ in self._deferred)

    def describe_due(self) -> str:
        """Describe the metrics that the next commit point reads for subscribers, or return ""."""
        if not self._due:
            return ""
        whose = [f"{name} for {who}" for name, _, who in self._subscribers if name in self._due]
        return (
            f"read {', '.join(whose)}. Publish a metric that a hook monitors on every rank, with "
            "weight=0 where there is no value"
        )

    def flush(self, log: bool, accelerator: Any = None) -> MetricsRecord | None:
        """Read pending values, call subscribers and return the record of a logging point.

        All ranks must call it. Costs one device-to-host copy and, with several processes, one
        collective; nothing if there is nothing to read.

        Args:
            log: True for a logging point; False reads only due metrics.
            accelerator: defines the ranks; None for one process.

        Raises:
            UnknownMetricError: a hook waits for a metric that its evaluation does not have.
        """
        if log:
            for collect, _ in tuple(self._collectors):
                collect()
        due = self._pop_deferred(everything=log or not self._listeners)
        read = self._accumulators.keys() if log else self._due
        accumulators = {name: self._accumulators.pop(name) for name in tuple(read)}
        must_read = log or bool(due or self._due)
        self._due = set()
        values = read_values(self._gather, accumulators, due, accelerator) if must_read else []
        for metrics, _ in due:
            self._check_evaluation_names(metrics)
        if log or self._listeners:
            self._unlogged += values
        self._notify(values)
        if not log:
            return None
        values, self._unlogged = self._unlogged, []
        return self._make_record(values)

    def flush_partial(self, accelerator: Any = None) -> MetricsRecord | None:
        """Pass listeners a partial record of the unlogged values, and keep the values.

        The trainer calls this on all ranks when a run ends between two logging points. A resumed
        run logs the values again at its next logging point. Subscribers are not called. Costs are
        those of :meth:`flush`.

        Returns:
            The record; None without values or listeners.
        """
        if not self._listeners:
            return None
        own, deferred, due = self.state_dict(), [*self._deferred], {*self._due}
        states = [(owner, owner.state_dict()) for _, owner in self._collectors if owner is not None]
        for collect, _ in tuple(self._collectors):
            collect()
        values = read_values(self._gather, self._accumulators, self._deferred, accelerator)
        reductions = self._reductions
        self.load_state_dict(own, None if accelerator is None else accelerator.device)
        self._reductions, self._deferred, self._due = reductions, deferred, due
        for owner, state in states:
            owner.load_state_dict(state)
        values = [*self._unlogged, *values]
        self._partial_names.update(value.name for value in values)
        return self._make_record(values, partial=True) if values else None

    def read_deferred(self, accelerator: Any = None) -> None:
        """Read all deferred metrics before saving a state; costs as :meth:`flush`."""
        values = read_values(self._gather, {}, self._pop_deferred(everything=True), accelerator)
        self._unlogged += values  # also after the run, without listeners
        self._notify(values)

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the unlogged values; call :meth:`read_deferred` before."""
        return {
            "version": STATE_VERSION,
            "windows": {
                name: {
                    "reduce": accumulator.reduce,
                    "step": accumulator.step,
                    "latest": accumulator.latest,
                    "weighted": accumulator.is_weighted,
                    "values": accumulator.state_dict(),
                }
                for name, accumulator in self._accumulators.items()
            },
            "reductions": dict(self._reductions),
            "found": [astuple(value) for value in self._last_values.values()],
            "unlogged": [astuple(value) for value in self._unlogged],
            "writers": {
                **self._writer_states,
                **{name: state() for name, state in self._writers.items()},
            },
        }

    @staticmethod
    def check(state: Any) -> None:
        """Raise a ``StateError`` if a state can't be loaded; changes nothing."""
        _SCHEMA.check(state, "the metrics board")

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Restore a state, with tensors on ``device`` or the CPU.

        Raises:
            StateError: the state has another version.
        """
        self.check(state)
        self._accumulators, self._deferred, self._due = {}, [], set()
        for name, saved in state["windows"].items():
            accumulator = self._accumulators[name] = Accumulator(saved["reduce"])
            accumulator.step, accumulator.latest = saved["step"], saved["latest"]
            accumulator.is_weighted = saved["weighted"]
            accumulator.load_state_dict(saved["values"], device or torch.device("cpu"))
        self._reductions = dict(state["reductions"])
        self._last_values = {name: MetricValue(name, *rest) for name, *rest in state["found"]}
        self._unlogged = [MetricValue(*value) for value in state["unlogged"]]
        self._writer_states = dict(state.get("writers", {}))  # older releases have none

    @staticmethod
    def redistribute_states(
        states: Sequence[Mapping[str, Any]], world_size: int
    ) -> list[dict[str, Any]]:
        """Return the states of all ranks, in rank order, for a different world size.

        Unweighted values that every old rank published are rescaled to the new world size.
        """
        publishing = Counter(name for state in states for name in state["windows"])

        def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            nearest = parts[0] if parts else states[-1]
            board = MetricsBoard()
            board.load_state_dict({**nearest, "windows": {}})  # the rest is equal on all ranks
            for part in parts:
                other = MetricsBoard()
                other.load_state_dict(part)
                board._merge(other)
            for name, accumulator in board._accumulators.items():
                if publishing[name] == len(states):
                    accumulator.rescale(world_size / len(states))
            return board.state_dict()

        return join_by_rank(states, world_size, merged)

    def _merge(self, other: MetricsBoard) -> None:
        """Accumulate the values of a later rank."""
        for name, accumulator in other._accumulators.items():
            own = self._accumulators.setdefault(name, accumulator)
            if own is not accumulator:
                own.merge(accumulator)
                own.step = max(own.step, accumulator.step)
        self._reductions = {**other._reductions, **self._reductions}

    # --- helpers -----------------------------------------------------------------------------

    def _open(self, name: str, reduce: Reduction) -> Accumulator:
        if reduce not in REDUCTIONS:
            raise ValueError(
                f"metric {name!r}: reduce must be one of {', '.join(map(repr, REDUCTIONS))}, "
                f"got {reduce!r}"
            )
        before = self._reductions.setdefault(name, reduce)
        if before != reduce:
            raise ValueError(
                f"metric {name!r} was published with reduce={before!r} before, got {reduce!r}; "
                "publish it under another name"
            )
        accumulator = self._accumulators[name] = Accumulator(reduce)
        if self._subscribers and any(name == known for known, _, _ in self._subscribers):
            self._due.add(name)
            self._when_due()
        return accumulator

    def _is_due(self, metrics: DeferredMetrics) -> bool:
        return not self._listeners or self._has_subscriber(metrics)

    def _has_subscriber(self, metrics: DeferredMetrics) -> bool:
        # By groups, since a rank without batches does not know all names.
        groups = tuple(f"{_group(name)}/" for name in metrics.names())
        return any(f"{name}/".startswith(groups) for name, _, _ in self._subscribers)

    def _pop_deferred(self, everything: bool) -> list[tuple[DeferredMetrics, int]]:
        """Remove and return all, or only due, deferred metrics."""
        due: list[tuple[DeferredMetrics, int]] = []
        later: list[tuple[DeferredMetrics, int]] = []
        for metrics, step in self._deferred:
            (due if everything or self._is_due(metrics) else later).append((metrics, step))
        self._deferred = later
        return due

    def _notify(self, values: Iterable[MetricValue]) -> None:
        """Call the subscribers in step order."""
        values = sorted(values, key=lambda value: value.step)
        self._last_values.update((value.name, value) for value in values)
        for value in values:
            for name, callback, _ in tuple(self._subscribers):
                if name == value.name:
                    callback(value)

    def _make_record(self, values: Iterable[MetricValue], partial: bool = False) -> MetricsRecord:
        """Make a record and call the listeners."""
        progress = self._progress
        counters = progress.epoch_id, progress.steps_done, progress.optimizer_step_id
        values = tuple(sorted(values, key=lambda value: value.step))
        record = MetricsRecord(*counters, values, partial)
        for listener in tuple(self._listeners):
            listener(record)
        return record

    def _check_evaluation_names(self, metrics: DeferredMetrics) -> None:
        """Refuse expected names missing from their evaluation."""
        names = metrics.names()
        groups = {_group(name) for name in names if name.startswith(_EVALUATION_PREFIX)}
        for name, who in self.expected_names():
            known = {*names, *self._reductions, *self._last_values}
            if _group(name) in groups and name not in known:
                raise UnknownMetricError(name, {*self.names(), *names}, who)


def _group(name: str) -> str:
    """Return the name without its last component; a single component is its own group."""
    group, _, last = name.rpartition("/")
    return group or last


def _check_weight(name: str, weight: Any, reduce: Reduction) -> Number:
    if reduce != "mean":
        raise ValueError(f"metric {name!r}: a weight requires reduce='mean', got {reduce!r}")
    checked = check_scalar(name, weight, "the weight of ")
    if not isinstance(checked, torch.Tensor) and not checked >= 0:
        raise ValueError(f"metric {name!r}: a weight must be >= 0, got {checked}")
    return checked
