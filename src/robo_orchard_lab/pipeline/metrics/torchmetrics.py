"""Metrics of torchmetrics: updated on the device, reduced with all metrics, computed on the CPU.

torchmetrics' own synchronization is off. :mod:`.metric_states` lists the private attributes used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.metrics.accumulators import MetricValueError
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction
from robo_orchard_lab.pipeline.metrics.metric_states import (
    MetricState,
    Rules,
    is_mergeable,
    merge_states,
    pack,
    put_state,
    rules_of,
    take_state,
    unpack,
)
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, list_of

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

MetricInputs: TypeAlias = Callable[[Any, Any], tuple[Any, ...] | Mapping[str, Any]]
"""``metric_inputs(outputs, batch)``: returns the arguments of ``metric.update``, as a tuple or by
name."""
MetricLike: TypeAlias = "Metric | MetricCollection"
MetricsLike: TypeAlias = "Mapping[str, MetricLike] | MetricCollection"
"""Metrics by name, or a collection, whose keys are the names."""
MetricStates: TypeAlias = list[MetricState]
"""States of all metrics of a set; merge several with :meth:`TorchMetrics.merge`."""

STATE_VERSION = 1
_INPUTS_REMEDY = (
    "define metric_inputs(outputs, batch) on the batch processor, or pass metric_inputs=..., to "
    "return the arguments of metric.update: a tuple, or a mapping by name"
)


class MetricArguments:
    """Arguments of ``metric.update`` for each batch, from ``metric_inputs(outputs, batch)``.

    None uses ``batch_processor.metric_inputs``, or, for a batch that is a pair (inputs, targets),
    the outputs and the targets.

    Raises:
        PipelineConfigError: ``metric_inputs`` is not callable.
    """

    def __init__(
        self, metric_inputs: MetricInputs | None, batch_processor: object, owner: str
    ) -> None:
        if metric_inputs is None:
            metric_inputs = getattr(batch_processor, "metric_inputs", None)
        if metric_inputs is not None and not callable(metric_inputs):
            raise PipelineConfigError(
                f"{owner}: metric_inputs must be callable as metric_inputs(outputs, batch), got "
                f"{type(metric_inputs).__name__}"
            )
        self._inputs: MetricInputs = metric_inputs or self._from_pair
        self._owner = owner

    def __call__(self, outputs: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, detached from their graphs.

        Raises:
            PipelineConfigError: no arguments are defined, or their type is wrong.
        """
        with torch.no_grad():
            found = self._inputs(outputs, batch)
        if isinstance(found, Mapping):
            return (), {name: _detach(value) for name, value in found.items()}
        if isinstance(found, (tuple, list)):
            return tuple(map(_detach, found)), {}
        raise PipelineConfigError(
            f"{self._owner}: metric_inputs must return the arguments of metric.update, a tuple or "
            f"a mapping by name, got {type(found).__name__}"
        )

    def _from_pair(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return outputs, batch[1]
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise PipelineConfigError(
            f"{self._owner}: expected a batch that is a pair (inputs, targets), found "
            f"{type(batch).__name__}{length}; {_INPUTS_REMEDY}"
        )


def _detach(value: Any) -> Any:
    """Detach tensors: list states of metrics would keep the graph of every batch."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(map(_detach, value))
    if type(value) is dict:
        return {name: _detach(item) for name, item in value.items()}
    return value


class ComputedMetric:
    """Metric on the CPU, to compute values from given states.

    Each call computes with a copy, about 1 ms, since some metrics cache computed values.
    """

    def __init__(self, name: str, metric: MetricLike, owner: str) -> None:
        self._name = name
        self._owner = owner
        self._metric = metric.to("cpu")
        self.rules = [rules_of(part) for part in submetrics(metric)]
        for part in submetrics(metric):
            part.distributed_available_fn = _never  # no sync in compute()
        self.names = self._initial_names()

    def __call__(self, states: Sequence[MetricState]) -> dict[str, float]:
        """Compute the values by name; identical on all ranks, even if computing uses the RNG."""
        metric = self._copy()
        for part, state, rules in zip(submetrics(metric), states, self.rules, strict=True):
            put_state(part, state, rules, updates=max(1, state.updates))
        try:
            with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                # Only if put_state() can't set the count.
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                torch.default_generator.manual_seed(0)
                result = metric.compute()
        except Exception as error:
            error.add_note(f"while {self._owner} computed the metric {self._name!r}")
            raise
        values = self._to_numbers(result)
        self.names = list(values)
        return values

    def _initial_names(self) -> list[str]:
        """Return the value names known before the first update.

        Raises:
            MetricValueError: the metric computes something other than numbers.
        """
        from torchmetrics import Metric

        try:
            with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                result = self._copy().compute()
        except Exception:  # many metrics need data
            result = None
        values = list(result.values()) if isinstance(result, Mapping) else [result]
        if result is not None and not any(_size(value) == 0 for value in values):
            return list(self._to_numbers(result))
        if not isinstance(self._metric, Metric):  # a collection
            return [self._value_name(key) for key in self._metric.keys()]  # noqa: SIM118 - no dict
        return [self._name, f"{self._name}/*"]

    def _copy(self) -> MetricLike:
        # Share the weights of networks inside the metric.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self._metric.parameters()}
        return copy.deepcopy(self._metric, memo)

    def _to_numbers(self, result: Any) -> dict[str, float]:
        values = result if isinstance(result, Mapping) else {"": result}
        return {
            (name := self._value_name(key)): self._to_number(name, value)
            for key, value in values.items()
        }

    def _value_name(self, key: Any) -> str:
        return "/".join(part for part in (self._name, str(key)) if part)

    def _to_number(self, name: str, value: Any) -> float:
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            return float(value)
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise MetricValueError(
            f"{self._owner}: the metric {name!r} computes a {type(value).__name__}{shape}; "
            "expected a number or a flat mapping of numbers; average it (average='macro'), wrap "
            "it in torchmetrics' ClasswiseWrapper, or return the numbers from compute()"
        )


def submetrics(metric: MetricLike) -> list[Metric]:
    """Return a metric and all nested metrics, in a fixed order."""
    from torchmetrics import Metric

    return [module for module in metric.modules() if isinstance(module, Metric)]


def _never() -> bool:
    return False


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    return len(value) if isinstance(value, (list, tuple)) else 1


_STATE = StateSchema(updates=Count, parts=Count, states=dict[str, list[torch.Tensor]])
_SAVED = StateSchema(STATE_VERSION, metrics=Any)
_STATES = StateSchema(metrics=list_of(_STATE))


def _check_elements(name: str, live: Any, saved: list[torch.Tensor], parts: int) -> None:
    """Compare the saved tensors of a metric's state with the live one."""
    is_one = len(saved) == 1 or (saved and parts > 1)
    if not is_one or not isinstance(live, torch.Tensor):
        raise StateError(f"the metric's state {name!r}: expected a tensor, found {len(saved)}")
    for tensor in saved:
        fits = tensor.shape == live.shape if live.dim() else tensor.numel() > 0 or not live.numel()
        if not fits or tensor.is_complex() != live.is_complex():
            raise StateError(
                f"the metric's state {name!r}: expected a tensor like {live.dtype} "
                f"{list(live.shape)}, found {tensor.dtype} {list(tensor.shape)}"
            )


class TorchMetrics:
    """Named metrics, updated on a device and computed on the CPU from the states of all ranks.

    The given metrics are copied and never changed, so several hooks may share them.

    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> from robo_orchard_lab.pipeline.metrics import resolve
    >>> metrics = TorchMetrics({"accuracy": MulticlassAccuracy(3, average="micro")})
    >>> metrics.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
    >>> resolve(metrics.snapshot(metrics.pop_states(), "val/"))
    {'val/accuracy': 0.75}

    The value of a metric is named ``name``, or ``name/key`` if the metric computes a mapping. A
    metric without updates on any rank has no value.

    Args:
        metrics: metrics by name, or a collection; may be empty.
        owner: name of the hook or evaluator, for errors.

    Raises:
        PipelineConfigError: an object is not a torchmetrics metric, or torchmetrics is missing.
        MetricValueError: a metric computes something other than numbers.
    """

    def __init__(self, metrics: MetricsLike | None, owner: str = "TorchMetrics") -> None:
        given = {} if metrics is None else _by_name(metrics, owner)
        computed = {n: ComputedMetric(n, _reset_copy(m), owner) for n, m in given.items()}
        self._set_up({n: _reset_copy(metric) for n, metric in given.items()}, computed, owner)

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> TorchMetrics:
        """Return the set of the metrics inside a module, not of copies, to save their states."""
        from torchmetrics import Metric, MetricCollection

        found: dict[str, MetricLike] = {}
        for name, part in module.named_modules():
            is_inside = any(name.startswith(f"{outer}.") for outer in found)
            if isinstance(part, Metric | MetricCollection) and not is_inside:
                found[name] = part
        metrics = cls(None, type(module).__name__)
        metrics._set_up(found, {}, type(module).__name__)
        return metrics

    def _set_up(
        self, metrics: dict[str, MetricLike], computed: dict[str, ComputedMetric], owner: str
    ) -> None:
        self._owner = owner
        self._metrics, self._computed = metrics, computed
        self._parts = [(p, rules_of(p)) for m in metrics.values() for p in submetrics(m)]
        self._rules = [rules for _, rules in self._parts]
        self._updaters = [_updater(metric) for metric in metrics.values()]
        self._earlier = [0] * len(self._parts)
        self._device: torch.device | None = None

    def __len__(self) -> int:
        return len(self._metrics)

    def select(self, mergeable: bool) -> TorchMetrics:
        """Return a new set of the metrics whose states can, or can't, be merged."""
        return self._copy_of(
            name
            for name, metric in self._metrics.items()
            if all(map(is_mergeable, submetrics(metric))) is mergeable
        )

    def _copy_of(self, names: Iterable[str]) -> TorchMetrics:
        """Return a new set of some metrics, without updates."""
        other, names = TorchMetrics(None), list(names)
        metrics = {name: _reset_copy(self._metrics[name]) for name in names}
        other._set_up(metrics, {name: self._computed[name] for name in names}, self._owner)
        return other

    def names(self) -> list[str]:
        """Return the value names; ``name/*`` for a mapping before its first value."""
        return [name for computed in self._computed.values() for name in computed.names]

    def to(self, device: torch.device) -> None:
        """Move the metrics to a device."""
        if device != self._device:
            self._device = device
            for metric in self._metrics.values():
                metric.to(device)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update all metrics; each gets the keyword arguments declared by its ``update``."""
        updated = self._updaters if kwargs else self._metrics.values()
        for metric in updated:
            metric.update(*args, **kwargs)

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in self._metrics.values():
            metric.reset()
        self._earlier = [0] * len(self._parts)

    def pop_states(self) -> MetricStates:
        """Return the states since the last call, and reset the metrics."""
        try:
            return self._take_states()
        except MetricValueError as error:
            raise MetricValueError(f"{self._owner}: {error}") from None
        finally:
            self.reset()

    def _take_states(self) -> MetricStates:
        return [
            take_state(metric, rules, earlier)
            for (metric, rules), earlier in zip(self._parts, self._earlier, strict=True)
        ]

    def merge(self, parts: Sequence[MetricStates]) -> MetricStates:
        """Merge states of several parts of the data."""
        return [
            merge_states(states, rules) for *states, rules in zip(*parts, self._rules, strict=True)
        ]

    def snapshot(self, states: MetricStates, prefix: str = "", suffix: str = "") -> MetricsSnapshot:
        """Return deferred metrics for the states of :meth:`pop_states` or :meth:`merge`."""
        device = self._device or torch.device("cpu")
        tensors = pack(states, self._rules, device)
        return MetricsSnapshot(tensors, self._rules, self._computed, prefix, suffix)

    # --- saved states ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the states since :meth:`pop_states`."""
        return {"version": STATE_VERSION, "metrics": self.encode(self._take_states())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the metrics.

        Raises:
            StateError: the state has another version or belongs to other metrics.
        """
        states = self.check(state)
        self.reset()
        self._earlier = [
            put_state(metric, of_metric, rules)
            for (metric, rules), of_metric in zip(self._parts, states, strict=True)
        ]

    def check(self, state: Any) -> MetricStates:
        """Return the decoded states, or raise a ``StateError``."""
        _SAVED.check(state, f"{self._owner}'s metrics")
        return self.decode(state["metrics"])

    def merge_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the saved states of several ranks; without states, return a fresh state.

        Raises:
            StateError: a state has another version or belongs to other metrics, or a metric with
                updates on several ranks can't be merged.
        """
        if not states:
            return self._copy_of(self._metrics).state_dict()
        parts = [self.check(state) for state in states]
        for number, (metric, _) in enumerate(self._parts):
            updated = sum(part[number].updates > 0 for part in parts)
            if updated > 1 and not is_mergeable(metric):
                raise StateError(
                    f"{self._owner}: {type(metric).__name__} has updates on {updated} ranks and "
                    "can't merge them; resume with the same or a larger world size, or from a "
                    "checkpoint at the end of an epoch with a logging point"
                )
        return {"version": STATE_VERSION, "metrics": self.encode(self.merge(parts))}

    def encode(self, states: MetricStates | None) -> list[dict[str, Any]] | None:
        """Return states as plain values and copies of tensors."""
        if states is None:
            return None
        return [
            {
                "updates": state.updates,
                "parts": state.parts,
                "states": {
                    name: [element.clone() for element in rule.compact(state.states[name])]
                    for name, rule in rules.items()
                },
            }
            for state, rules in zip(states, self._rules, strict=True)
        ]

    def decode(self, saved: Sequence[Mapping[str, Any]]) -> MetricStates:
        """Return the states from :meth:`encode`, copied to the device of the metrics.

        Raises:
            StateError: the states belong to other metrics.
        """
        _STATES.check({"metrics": saved}, self._owner)
        found = [list(state["states"]) for state in saved]
        expected = [list(rules) for rules in self._rules]
        if found != expected:
            raise StateError(
                f"the saved metrics of {self._owner} differ: expected states {expected}, "
                f"found {found}"
            )
        for state, (metric, rules) in zip(saved, self._parts, strict=True):
            for name, rule in rules.items():
                if not rule.is_list:
                    _check_elements(
                        name, getattr(metric, name), state["states"][name], state["parts"]
                    )
        states = [MetricState(state["updates"], state["states"], state["parts"]) for state in saved]
        return self.to_device(states, copy=True)

    def to_device(self, states: MetricStates, copy: bool = False) -> MetricStates:
        """Move states to the device of the metrics."""
        device = self._device or torch.device("cpu")
        return [state.to(device, copy) for state in states]


@dataclass(eq=False)
class MetricsSnapshot:
    """States of a set of metrics, to reduce over the ranks and compute; a `DeferredMetrics`."""

    packed: Sequence[torch.Tensor]
    rules: Sequence[Rules]
    computed: Mapping[str, ComputedMetric]
    prefix: str
    suffix: str
    _names: list[str] | None = field(default=None, init=False)

    def names(self) -> Sequence[str]:
        """Return the value names; ``name/*`` for a mapping before its first value."""
        if self._names is not None:
            return self._names
        return [self._full_name(name) for c in self.computed.values() for name in c.names]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(tensor, "cat") for tensor in self.packed]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        header, packed = reduced
        ranks = unpack(header, packed, self.rules)
        states = [
            merge_states(of_ranks, rules)
            for *of_ranks, rules in zip(*ranks, self.rules, strict=True)
        ]
        found: dict[str, float] = {}
        for computed in self.computed.values():
            own, states = states[: len(computed.rules)], states[len(computed.rules) :]
            if any(state.updates for state in own):
                found.update(computed(own))
        values = {self._full_name(name): value for name, value in found.items()}
        self._names = list(values)
        return values

    def _full_name(self, name: str) -> str:
        return f"{self.prefix}{name}{self.suffix}"


def _reset_copy(metric: MetricLike) -> MetricLike:
    copied: MetricLike = metric.clone()
    copied.reset()
    return copied


def _updater(metric: MetricLike) -> MetricLike:
    """Return an object whose ``update`` filters keyword arguments: a collection."""
    from torchmetrics import MetricCollection

    if isinstance(metric, MetricCollection):
        return metric
    return MetricCollection({"metric": metric}, compute_groups=False)


def _by_name(metrics: Any, owner: str) -> dict[str, MetricLike]:
    if isinstance(metrics, Mapping) and not metrics:
        return {}
    try:
        from torchmetrics import Metric, MetricCollection  # costs a second; plain runs avoid it
    except ImportError as error:
        raise PipelineConfigError(
            f"{owner}: metrics need torchmetrics, which can't be imported ({error}); "
            'pip install "robo-orchard-hooks[metrics]"'
        ) from error
    if isinstance(metrics, MetricCollection):
        return {"": metrics}  # the keys of the collection are the names
    if not isinstance(metrics, Mapping):
        raise PipelineConfigError(
            f"{owner}: metrics must be a mapping from names to torchmetrics metrics, or a "
            f"MetricCollection, got {type(metrics).__name__}; write metrics={{'accuracy': ...}}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise PipelineConfigError(
                f"{owner}: metric names must be non-empty strings, got {name!r}"
            )
        if not isinstance(metric, (Metric, MetricCollection)):
            raise PipelineConfigError(
                f"{owner}: metrics[{name!r}] must be a torchmetrics metric, "
                f"got {type(metric).__name__}"
            )
    return dict(metrics)
