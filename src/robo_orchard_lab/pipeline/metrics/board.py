"""The board on which hooks publish named scalars for others to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol, TypeAlias

import torch

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.distributed.collectives import joined_by_rank
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.metrics.accumulators import (
    REDUCTIONS,
    WINDOWS,
    MeanWindow,
    MetricsRecord,
    MetricValue,
    Number,
    Reduction,
    UnknownMetricError,
    WeightedSum,
    Window,
    check_scalar,
)
from robo_orchard_lab.pipeline.metrics.exchange import DeferredMetrics, Reader
from robo_orchard_lab.pipeline.progress import TrainerProgress

Subscriber: TypeAlias = Callable[[MetricValue], Any]
Listener: TypeAlias = Callable[[MetricsRecord], Any]

STATE_VERSION = 2
_EVALUATIONS = "eval/"  # what the names of evaluations begin with
_NUMBER_TYPES = (float, int)
_NOBODY_LOGS = (
    "Some hooks publish at logging points alone, and nobody makes any; register a MetricsLogger"
)


class Stateful(Protocol):
    """What gives its state and goes on from one, such as a bundle of hooks."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class MetricsBoard:
    """Named scalars, from the hooks that measure them to those that show or act on them.

    What is published adds up where it lies, on the host or on a device, and nothing is read
    before a *logging point*: then everything travels in one packed transfer and, with several
    ranks, in one packed collective, and every rank has the values of all. The trainer makes one at
    the commit point where a hook has asked for it (``args.requests.log``).

    >>> board = MetricsBoard()
    >>> board.publish("loss", 1.0, weight=8)
    >>> board.publish("loss", torch.tensor(4.0), weight=4)
    >>> board.flush(log=True).values
    (MetricValue(name='loss', value=2.0, step=0),)

    Args:
        progress: the counters of the run, by which values know their step.
    """

    def __init__(self, progress: TrainerProgress | None = None) -> None:
        self._progress = TrainerProgress() if progress is None else progress
        self._windows: dict[str, Window] = {}
        self._reductions: dict[str, Reduction] = {}  # of every name that was ever published
        self._found: dict[str, MetricValue] = {}  # the last values that were read
        self._deferred: list[tuple[DeferredMetrics, int]] = []
        self._told: set[str] = set()  # the names in a partial record
        self._unlogged: list[MetricValue] = []  # found already, for the next record
        self._subscribers: list[tuple[str, Subscriber, str]] = []
        self._expected: list[tuple[str, str]] = []
        self._listeners: list[Listener] = []
        self._collectors: list[tuple[Callable[[], Any], Stateful | None]] = []
        self._reader = Reader()

    def publish(
        self, name: str, value: Number, reduce: Reduction = "mean", weight: Number | None = None
    ) -> None:
        """Add a value to what the name has had since the last logging point.

        Args:
            name: by the tags ``loss/<name>``, ``lr/group<i>``, ``perf/*``, ``eval/*``, or any.
            value: a number, or a tensor of one element, of any dtype and on any device. It is
                not read here; a tensor may be changed afterwards.
            reduce: how the values of a window, and those of the ranks, become one. ``last`` takes
                that of the first rank that has any.
            weight: what the value weighs in a mean, >= 0; 1 by default. The mean over ranks and
                window is exact for batches of different sizes, when each weighs its samples.

        Raises:
            MetricValueError: the value is no single real number.
            ValueError: the name was published with another ``reduce`` before, the reduction is
                unknown, or the weight is negative or goes with another reduction than the mean.
        """
        if type(value) not in _NUMBER_TYPES and not (
            isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()
        ):
            value = check_scalar(name, value)
        weighted = weight is not None
        if weight is None:
            weight = 1.0
        elif type(weight) not in _NUMBER_TYPES or reduce != "mean" or not weight >= 0:
            weight = _checked_weight(name, weight, reduce)
        window = self._windows.get(name)
        if window is None or window.reduce != reduce:
            window = self._open(name, reduce)
            window.weighted = weighted
        window.add(value, weight)
        window.latest = value.detach() if isinstance(value, torch.Tensor) else value
        window.step = self._progress.steps_done

    def publish_total(self, name: str, total: WeightedSum) -> None:
        """Add a weighted sum to what the name has had, as its values one by one with ``mean``.

        The board takes the sum over: go on with another one.
        """
        window = self._windows.get(name) or self._open(name, "mean")
        if not isinstance(window, MeanWindow):
            raise ValueError(f"metric {name!r} is published with reduce={window.reduce!r}")
        window.take_over(total)
        window.weighted = True
        window.step = self._progress.steps_done
        if total.host_weight and total.tensor is None:
            window.latest = total.host / total.host_weight

    def defer(self, metrics: DeferredMetrics) -> None:
        """Publish metrics whose values follow from tensors, with the next logging point.

        Where someone has subscribed to one of them, or nobody logs, they are read at the next
        commit point at which something is carried out, at the latest that after the epoch.
        """
        self._deferred.append((metrics, self._progress.steps_done))

    def subscribe(self, name: str, callback: Subscriber, who: str = "") -> RemovableHandle:
        """Have every new value of a name told, on every rank alike.

        Values are known at logging points, those of evaluations at the commit point where they
        were made. Subscribe on every rank alike.

        Args:
            name: of the metric.
            callback: called with each :class:`MetricValue`, in the order of their steps.
            who: waits for it, for the error if nobody publishes it.
        """
        entry = (name, callback, who)
        self._subscribers.append(entry)
        return RemovableHandle(lambda: self._subscribers.remove(entry))

    def expect(self, name: str, who: str) -> RemovableHandle:
        """Have it refused, as with :meth:`subscribe`, if nobody publishes a name."""
        entry = (name, who)
        self._expected.append(entry)
        return RemovableHandle(lambda: self._expected.remove(entry))

    def listen(self, callback: Listener) -> RemovableHandle:
        """Have the record of every logging point told.

        Call it on every rank alike: whether someone listens decides when ranks exchange.
        """
        self._listeners.append(callback)
        return RemovableHandle(lambda: self._listeners.remove(callback))

    def before_logging(
        self, callback: Callable[[], Any], owner: Stateful | None = None
    ) -> RemovableHandle:
        """Have a function called ahead of every logging point, to publish what was gathered.

        Args:
            callback: publishes, and begins to gather anew.
            owner: the hook that gathered the values. :meth:`flush_partial` gives it back the
                state that it had. None for what has no state that is saved.
        """
        entry = (callback, owner)
        self._collectors.append(entry)
        return RemovableHandle(lambda: self._collectors.remove(entry))

    def latest(self, name: str) -> float:
        """What the last logging point found, or else this rank's own latest value.

        The latter is the value of a name that no logging point has had yet; to read it from a
        device waits for that.

        Raises:
            UnknownMetricError: the name was never published; the message lists those that were.
        """
        found = self._found.get(name)
        if found is not None:
            return found.value
        window = self._windows.get(name)
        if window is None:
            raise UnknownMetricError(name, self.names())
        return float(window.latest)

    def last_value(self, name: str) -> float | None:
        """What was last read of a name, at a logging point or after an evaluation; else None."""
        found = self._found.get(name)
        return None if found is None else found.value

    def last_values(self) -> list[MetricValue]:
        """What was last read of each name, with the step that it belongs to."""
        return list(self._found.values())

    def names(self) -> list[str]:
        """The published names, in the order of their first publication."""
        return list(self._reductions | dict.fromkeys(self._found))

    @property
    def is_logged(self) -> bool:
        """Whether someone listens to logging points."""
        return bool(self._listeners)

    def find_missing(self, at_end: bool = True) -> UnknownMetricError | None:
        """The error to raise if someone waits for a name that nobody has published, or None.

        Args:
            at_end: with False, only of names that should have come by now: there has been a
                logging point, and they are not of an evaluation, which may be still to come.
        """
        known = {*self.names(), *self._told}
        for name, who in self._awaited():
            if name not in known and (
                at_end or (self._found and not name.startswith(_EVALUATIONS))
            ):
                hint = "" if self._listeners or not self._collectors else _NOBODY_LOGS
                return UnknownMetricError(name, known, who, hint)
        return None

    def find_unlogged(self) -> str | None:
        """What to do about a name that someone waits for and that is published, but never read."""
        for name, _, who in self._subscribers:
            if name in self._windows and name not in self._found and not self._listeners:
                return (
                    f"{who} waits for {name!r}, which is published, but nobody makes logging "
                    "points, at which it would be told; register a MetricsLogger"
                )
        return None

    def flush(self, log: bool, accelerator: Any = None) -> MetricsRecord | None:
        """Read what is due, tell it, and give the record of a logging point.

        All ranks call it alike. It takes one transfer from the device and, with several
        processes, one collective; none where there is nothing to read.

        Args:
            log: whether this is a logging point; else only deferred metrics are read that
                someone waits for.
            accelerator: the processes; None for this one alone.

        Raises:
            UnknownMetricError: someone waits for a metric of an evaluation that has other ones.
        """
        if log:
            for collect, _ in tuple(self._collectors):
                collect()
        due = self._take_deferred(everything=log or not self._listeners)
        windows: dict[str, Window] = {}
        if log:
            windows, self._windows = self._windows, {}
        values = self._reader.read(windows, due, accelerator) if log or due else []
        for metrics, _ in due:
            self._refuse_misspelled(metrics)
        if log or self._listeners:
            self._unlogged += values
        self._tell(values)
        if not log:
            return None
        values, self._unlogged = self._unlogged, []
        return self._record(values)

    def flush_partial(self, accelerator: Any = None) -> MetricsRecord | None:
        """Tell who listens what no logging point has had, as a partial record, and keep it.

        The trainer does this when it ends between two logging points: all of it is told, and a
        run that goes on from a save still has it for its next logging point. Subscribers, which
        act on values, are told there. All ranks call it alike; costs are those of :meth:`flush`.

        Returns:
            The record; None if there is nothing to tell, or nobody who listens.
        """
        if not self._listeners:
            return None
        windows, deferred = self._windows, self._deferred
        self._windows = {name: window.copy() for name, window in windows.items()}
        self._deferred = [*deferred]
        states = [(owner, owner.state_dict()) for _, owner in self._collectors if owner is not None]
        for collect, _ in tuple(self._collectors):
            collect()
        values = self._reader.read(self._windows, self._deferred, accelerator)
        self._windows, self._deferred = windows, deferred
        for owner, state in states:
            owner.load_state_dict(state)
        values = [*self._unlogged, *values]
        self._told.update(value.name for value in values)
        return self._record(values, partial=True) if values else None

    def read_deferred(self, accelerator: Any = None) -> None:
        """Read all deferred metrics, so that the state holds numbers; as :meth:`flush` does."""
        values = self._reader.read({}, self._take_deferred(everything=True), accelerator)
        self._unlogged += values  # also after the run, when nobody listens any more
        self._tell(values)

    def state_dict(self) -> dict[str, Any]:
        """What was published and not logged yet; call :meth:`read_deferred` first."""
        return {
            "version": STATE_VERSION,
            "windows": {
                name: {
                    "reduce": window.reduce,
                    "step": window.step,
                    "latest": window.latest,
                    "weighted": window.weighted,
                    "values": window.state_dict(),
                }
                for name, window in self._windows.items()
            },
            "reductions": dict(self._reductions),
            "found": [astuple(value) for value in self._found.values()],
            "unlogged": [astuple(value) for value in self._unlogged],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go on from a state; its tensors go to ``device``, by default the CPU.

        Raises:
            StateError: another version.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"expected a state of the metrics board of version {STATE_VERSION}, "
                f"found version {state.get('version')!r}"
            )
        self._windows = {}
        for name, saved in state["windows"].items():
            window = self._windows[name] = WINDOWS[saved["reduce"]]()
            window.step, window.latest = saved["step"], saved["latest"]
            window.weighted = saved["weighted"]
            window.load_state_dict(saved["values"], device or torch.device("cpu"))
        self._reductions = dict(state["reductions"])
        self._found = {name: MetricValue(name, *rest) for name, *rest in state["found"]}
        self._unlogged = [MetricValue(*value) for value in state["unlogged"]]

    @staticmethod
    def redistribute_states(
        states: Sequence[Mapping[str, Any]], processes: int
    ) -> list[dict[str, Any]]:
        """States for another number of processes, in which all that was published is once.

        What every rank has published without a weight, which is as many values as there are ranks,
        weighs what as many as there are now would have.

        Args:
            states: of the ranks that saved, in their order.
            processes: how many states are wanted.
        """
        publishing = Counter(name for state in states for name in state["windows"])

        def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            nearest = parts[0] if parts else states[-1]
            board = MetricsBoard()
            board.load_state_dict({**nearest, "windows": {}})  # the rest is alike on all ranks
            for part in parts:
                other = MetricsBoard()
                other.load_state_dict(part)
                board._take_in(other)
            for name, window in board._windows.items():
                if publishing[name] == len(states):
                    window.spread(processes / len(states))
            return board.state_dict()

        return joined_by_rank(states, processes, joined)

    def _take_in(self, other: MetricsBoard) -> None:
        """Add what was published on a later rank."""
        for name, window in other._windows.items():
            own = self._windows.setdefault(name, window)
            if own is not window:
                own.merge(window)
                own.step = max(own.step, window.step)
        self._reductions = {**other._reductions, **self._reductions}

    def _open(self, name: str, reduce: Reduction) -> Window:
        if reduce not in REDUCTIONS:
            raise ValueError(
                f"metric {name!r}: reduce must be one of {', '.join(map(repr, REDUCTIONS))}, "
                f"got {reduce!r}"
            )
        before = self._reductions.setdefault(name, reduce)
        if before != reduce:
            raise ValueError(
                f"metric {name!r} was published with reduce={before!r} before, and now with "
                f"{reduce!r}; publish it under another name"
            )
        window = self._windows[name] = WINDOWS[reduce]()
        return window

    def has_due_metrics(self) -> bool:
        """Whether deferred metrics are to be read at the next commit point; alike on all ranks."""
        return any(self._is_due(metrics) for metrics, _ in self._deferred)

    def _is_due(self, metrics: DeferredMetrics) -> bool:
        if not self._listeners:
            return True
        groups = {_group(name) for name, _, _ in self._subscribers}
        return not groups.isdisjoint(map(_group, metrics.names()))

    def _take_deferred(self, everything: bool) -> list[tuple[DeferredMetrics, int]]:
        """Those that are to be read now: all, or those that a subscriber may be waiting for."""
        due: list[tuple[DeferredMetrics, int]] = []
        later: list[tuple[DeferredMetrics, int]] = []
        for metrics, step in self._deferred:
            (due if everything or self._is_due(metrics) else later).append((metrics, step))
        self._deferred = later
        return due

    def _tell(self, values: Iterable[MetricValue]) -> None:
        """Tell who has subscribed, in the order of the steps."""
        values = sorted(values, key=lambda value: value.step)
        self._found.update((value.name, value) for value in values)
        for value in values:
            for name, callback, _ in tuple(self._subscribers):
                if name == value.name:
                    callback(value)

    def _record(self, values: Iterable[MetricValue], partial: bool = False) -> MetricsRecord:
        """Make a record and tell who listens."""
        progress = self._progress
        counters = progress.epoch_id, progress.steps_done, progress.optimizer_step_id
        values = tuple(sorted(values, key=lambda value: value.step))
        record = MetricsRecord(*counters, values, partial)
        for listener in tuple(self._listeners):
            listener(record)
        return record

    def _awaited(self) -> list[tuple[str, str]]:
        """The names that someone waits for, and who."""
        return [*((name, who) for name, _, who in self._subscribers), *self._expected]

    def _refuse_misspelled(self, metrics: DeferredMetrics) -> None:
        """An evaluation has all of its names at once; who waits for others waits in vain."""
        names = metrics.names()
        groups = {_group(name) for name in names if name.startswith(_EVALUATIONS)}
        for name, who in self._awaited():
            if _group(name) in groups and name not in names and name not in self._found:
                raise UnknownMetricError(name, {*self.names(), *names}, who)


def _group(name: str) -> str:
    """All but the last part of a name; what belongs to no group is one by itself."""
    group, _, last = name.rpartition("/")
    return group or last


def _checked_weight(name: str, weight: Any, reduce: Reduction) -> Number:
    if reduce != "mean":
        raise ValueError(f"metric {name!r}: a weight goes with reduce='mean', not with {reduce!r}")
    checked = check_scalar(name, weight, "the weight of ")
    if not isinstance(checked, torch.Tensor) and not checked >= 0:
        raise ValueError(f"metric {name!r}: a weight must be >= 0, got {checked}")
    return checked
