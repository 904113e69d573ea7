"""Metrics of torchmetrics, whose states travel with everything else that is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.metrics._computed_metric import (
    ComputedMetric,
    MetricLike,
    is_collection,
    metrics_within,
)
from robo_orchard_lab.pipeline.metrics._metric_states import (
    MetricState,
    Rules,
    joined,
    pack,
    parts_make_the_whole,
    put_state,
    rules_of,
    take_state,
    unpack,
)
from robo_orchard_lab.pipeline.metrics.deferred import StateReduction
from robo_orchard_lab.pipeline.metrics.errors import MetricValueError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

MetricsLike: TypeAlias = "Mapping[str, MetricLike] | MetricCollection"
"""Metrics by name, or a collection, which names its own."""
Gathered: TypeAlias = list[MetricState]
"""What all metrics of a set have gathered; :meth:`TorchMetrics.join` makes one of several."""

STATE_VERSION = 1


class TorchMetrics:
    """Named metrics that gather on a device, and are computed on the CPU from all ranks' states.

    The given metrics are copied twice, once to gather and once to compute, so that theirs stay as
    they are, and the same ones may be given to several hooks. Nothing of torchmetrics' own talks
    to other ranks.

    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> from robo_orchard_lab.pipeline.metrics import resolve
    >>> metrics = TorchMetrics({"accuracy": MulticlassAccuracy(3, average="micro")})
    >>> metrics.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
    >>> resolve(metrics.snapshot(metrics.take(), "val/"))
    {'val/accuracy': 0.75}

    A metric's value is ``name``, or ``name/key`` where it computes a mapping. One that was never
    updated on any rank has none.

    Args:
        metrics: by name, or a collection; may be empty.
        who: uses them, for errors.

    Raises:
        PipelineConfigError: something is no metric of torchmetrics, or that is not installed.
        MetricValueError: a metric's value is known to be no single number.
    """

    def __init__(self, metrics: MetricsLike | None, who: str = "TorchMetrics") -> None:
        given = {} if metrics is None else _by_name(metrics, who)
        self._who = who
        self._metrics: dict[str, MetricLike] = {n: metric.clone() for n, metric in given.items()}
        self.reset()
        self._computed = {n: ComputedMetric(n, m.clone(), who) for n, m in self._metrics.items()}
        self._find_parts()
        self._device: torch.device | None = None

    def _find_parts(self) -> None:
        self._parts = [
            (part, rules_of(part)) for m in self._metrics.values() for part in metrics_within(m)
        ]
        self._rules = [rules for _, rules in self._parts]

    def __len__(self) -> int:
        return len(self._metrics)

    def only(self, can_be_joined: bool) -> TorchMetrics:
        """A set of those of these metrics whose states :meth:`join` can join, or of the others."""
        return self._copy_of(
            name
            for name, metric in self._metrics.items()
            if all(map(parts_make_the_whole, metrics_within(metric))) is can_be_joined
        )

    def _copy_of(self, names: Iterable[str]) -> TorchMetrics:
        """Some of these metrics, which have gathered nothing."""
        other = TorchMetrics(None, self._who)
        for name in names:
            other._metrics[name] = self._metrics[name].clone()
            other._computed[name] = self._computed[name]
        other.reset()
        other._find_parts()
        return other

    def names(self) -> list[str]:
        """Those of the values; ``name/*`` in the place of a mapping's that are not known yet."""
        return [name for computed in self._computed.values() for name in computed.names]

    def to(self, device: torch.device) -> None:
        """Gather on a device from here on."""
        if device != self._device:
            self._device = device
            for metric in self._metrics.values():
                metric.to(device)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take a batch in. Of arguments by name, each metric gets those that it declares."""
        for metric in self._metrics.values():
            if kwargs and not is_collection(metric):  # which does so itself
                metric.update(*args, **metric._filter_kwargs(**kwargs))  # type: ignore[operator]  # a method
            else:
                metric.update(*args, **kwargs)

    def reset(self) -> None:
        """Start anew."""
        for metric in self._metrics.values():
            metric.reset()

    def take(self) -> Gathered:
        """What was gathered since the last time; the metrics start anew."""
        try:
            return [take_state(metric, rules) for metric, rules in self._parts]
        except MetricValueError as error:
            raise MetricValueError(f"{self._who}: {error}") from None
        finally:
            self.reset()

    def join(self, parts: Sequence[Gathered]) -> Gathered:
        """What was gathered in several parts of the data, as one."""
        return [joined(states, rules) for *states, rules in zip(*parts, self._rules, strict=True)]

    def snapshot(self, gathered: Gathered, prefix: str = "", suffix: str = "") -> MetricsSnapshot:
        """What was gathered, to be reduced over the ranks, read and computed.

        Args:
            gathered: by :meth:`take` or :meth:`join`.
            prefix: of the names of the values.
            suffix: of the same.
        """
        device = self._device or torch.device("cpu")
        tensors = pack(gathered, self._rules, device)
        return MetricsSnapshot(tensors, self._rules, self._computed, (prefix, suffix))

    def state_dict(self) -> dict[str, Any]:
        """What was gathered since :meth:`take`, which goes on."""
        states = [take_state(metric, rules) for metric, rules in self._parts]
        return {"version": STATE_VERSION, "metrics": self.saved(states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            StateError: it is that of other metrics, or of another version.
        """
        gathered = self._gathered(state)
        for (metric, rules), of_metric in zip(self._parts, gathered, strict=True):
            put_state(metric, of_metric, rules)
            metric._update_count = of_metric.updates

    def _gathered(self, state: Mapping[str, Any]) -> Gathered:
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"expected a state of {self._who}'s metrics of version {STATE_VERSION}, "
                f"found version {state.get('version')!r}"
            )
        return self.loaded(state["metrics"])

    def joined_states(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One state of those of several ranks; of none, that of metrics that begin anew.

        Raises:
            StateError: it is that of other metrics, or of another version, or a metric that has
                gathered on several ranks can't go on as one.
        """
        if not states:
            return self._copy_of(self._metrics).state_dict()
        parts = [self._gathered(state) for state in states]
        self._refuse_apart(parts)
        return {"version": STATE_VERSION, "metrics": self.saved(self.join(parts))}

    def _refuse_apart(self, parts: Sequence[Gathered]) -> None:
        for number, (metric, _) in enumerate(self._parts):
            updated = sum(part[number].updates > 0 for part in parts)
            if updated > 1 and not parts_make_the_whole(metric):
                raise StateError(
                    f"{self._who}: {type(metric).__name__} was gathering on {updated} ranks, and "
                    "can't go on with their samples on one; resume with as many processes as "
                    "before, or more, or from a checkpoint of a moment at which it gathers "
                    "nothing, such as the end of an epoch at which there is a logging point"
                )

    def saved(self, gathered: Gathered | None) -> list[dict[str, Any]] | None:
        """What was gathered as plain values and copies of tensors."""
        if gathered is None:
            return None
        return [
            {
                "updates": state.updates,
                "parts": state.parts,
                "states": {
                    name: [element.clone() for element in rule.gathered(state.states[name])]
                    for name, rule in rules.items()
                },
            }
            for state, rules in zip(gathered, self._rules, strict=True)
        ]

    def loaded(self, saved: Sequence[Mapping[str, Any]]) -> Gathered:
        """What :meth:`saved` gave, where these metrics gather.

        Raises:
            StateError: it is that of other metrics.
        """
        found = [list(state["states"]) for state in saved]
        expected = [list(rules) for rules in self._rules]
        if found != expected:
            raise StateError(
                f"the saved metrics of {self._who} are other ones: their states are {found}, "
                f"those here {expected}"
            )
        return self.placed(
            [MetricState(state["updates"], state["states"], state["parts"]) for state in saved],
            copy=True,
        )

    def placed(self, gathered: Gathered, copy: bool = False) -> Gathered:
        """What was gathered, where these metrics gather now."""
        device = self._device or torch.device("cpu")
        return [
            MetricState(
                state.updates,
                {n: [e.to(device, copy=copy) for e in es] for n, es in state.states.items()},
                state.parts,
            )
            for state in gathered
        ]


class MetricsSnapshot:
    """What a set of metrics has gathered; a :class:`DeferredMetrics`."""

    def __init__(
        self,
        packed: Sequence[torch.Tensor],
        rules: Sequence[Rules],
        computed: Mapping[str, ComputedMetric],
        around_name: tuple[str, str],
    ) -> None:
        self._packed = packed
        self._rules = rules
        self._computed = computed
        self._prefix, self._suffix = around_name
        self._names: list[str] | None = None

    def names(self) -> Sequence[str]:
        """Those of the values; until a mapping was computed for the first time, ``name/*``."""
        if self._names is not None:
            return self._names
        return [self._full(name) for c in self._computed.values() for name in c.names]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(tensor, "cat") for tensor in self._packed]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        header, packed = reduced
        ranks = unpack(header, packed, self._rules)
        states = [
            joined(of_ranks, rules) for *of_ranks, rules in zip(*ranks, self._rules, strict=True)
        ]
        found: dict[str, float] = {}
        for computed in self._computed.values():
            own, states = states[: len(computed.rules)], states[len(computed.rules) :]
            if any(state.updates for state in own):
                found.update(computed(own))
        values = {self._full(name): value for name, value in found.items()}
        self._names = list(values)
        return values

    def _full(self, name: str) -> str:
        return f"{self._prefix}{name}{self._suffix}"


def require_torchmetrics(who: str) -> None:
    """Refuse to go on without torchmetrics.

    Raises:
        PipelineConfigError: it can't be imported; the message says how to install it.
    """
    try:
        import torchmetrics  # noqa: F401 - takes a second, and plain runs need not wait
    except ImportError as error:
        raise PipelineConfigError(
            f"{who}: metrics need torchmetrics, which can't be imported ({error}); "
            'pip install "robo-orchard-hooks[metrics]"'
        ) from error


def _by_name(metrics: Any, who: str) -> dict[str, MetricLike]:
    if isinstance(metrics, Mapping) and not metrics:
        return {}
    require_torchmetrics(who)
    from torchmetrics import Metric, MetricCollection

    if isinstance(metrics, MetricCollection):
        return {"": metrics}  # its keys are names enough
    if not isinstance(metrics, Mapping):
        raise PipelineConfigError(
            f"{who}: metrics must be a mapping from names to metrics of torchmetrics, or a "
            f"MetricCollection, got {type(metrics).__name__}; write metrics={{'accuracy': ...}}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise PipelineConfigError(
                f"{who}: the names of metrics must be texts that aren't empty, got {name!r}"
            )
        if not isinstance(metric, (Metric, MetricCollection)):
            raise PipelineConfigError(
                f"{who}: metrics[{name!r}] must be a metric of torchmetrics, "
                f"got {type(metric).__name__}"
            )
    return dict(metrics)
