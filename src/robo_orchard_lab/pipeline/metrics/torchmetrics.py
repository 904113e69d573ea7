"""Metrics of torchmetrics, whose states travel with everything else that is published."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


# --- inputs ---


MetricInputs: TypeAlias = Callable[[Any, Any], tuple[Any, ...] | Mapping[str, Any]]
"""``metric_inputs(outputs, batch)``: the arguments of ``metric.update``, in their order or by name.
"""

_REMEDY = (
    "define metric_inputs(outputs, batch) on the batch processor, or give metric_inputs=..., to "
    "return the arguments of metric.update: a tuple, or a mapping by name"
)


class MetricArguments:
    """What metrics are updated with, of each batch.

    Args:
        given: how to tell; or else ``batch_processor.metric_inputs``; or else, of a batch that is
            a pair (inputs, targets), the outputs and the targets.
        batch_processor: of the run.
        who: updates the metrics, for errors.

    Raises:
        PipelineConfigError: ``given``, or what the processor has by that name, can't be called.
    """

    def __init__(self, given: MetricInputs | None, batch_processor: object, who: str) -> None:
        found = given if given is not None else getattr(batch_processor, "metric_inputs", None)
        if found is not None and not callable(found):
            raise PipelineConfigError(
                f"{who}: metric_inputs must be callable as metric_inputs(outputs, batch), got "
                f"{type(found).__name__}"
            )
        self._inputs: MetricInputs = found or self._of_a_pair
        self._who = who

    def __call__(self, outputs: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, without their graphs.

        Raises:
            PipelineConfigError: nothing says what they are, or it gives something else.
        """
        with torch.no_grad():
            found = self._inputs(outputs, batch)
        if isinstance(found, Mapping):
            return (), {name: _detached(value) for name, value in found.items()}
        if isinstance(found, (tuple, list)):
            return tuple(map(_detached, found)), {}
        raise PipelineConfigError(
            f"{self._who}: metric_inputs gave a {type(found).__name__}; it must give the arguments "
            "of metric.update: a tuple, or a mapping by name"
        )

    def _of_a_pair(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return outputs, batch[1]
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise PipelineConfigError(
            f"{self._who}: can't tell what to update metrics with from a batch that is no pair of "
            f"inputs and targets, but a {type(batch).__name__}{length}; {_REMEDY}"
        )


def _detached(value: Any) -> Any:
    """Metrics keep what they get, and would keep its graph."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    if type(value) is dict:
        return {name: _detached(item) for name, item in value.items()}
    return value


# --- computed metric -------------------------------------------------------------------------
# Values of a metric of torchmetrics, computed on the CPU from states.


MetricLike: TypeAlias = "Metric | MetricCollection"


class ComputedMetric:
    """One metric on the CPU, to compute values with.

    Each time a copy computes, since some keep what they have computed, which takes about 1 ms.
    """

    def __init__(self, name: str, metric: MetricLike, who: str) -> None:
        self._name = name
        self._who = who
        self._metric = metric.to("cpu")
        self.rules = [rules_of(part) for part in submetrics(metric)]
        for part in submetrics(metric):
            part.sync_on_compute = part._to_sync = False  # or its compute would talk to other ranks
        self.names = self._names_at_first()

    def __call__(self, states: Sequence[MetricState]) -> dict[str, float]:
        """The values by name; of all ranks alike, also where computing draws random numbers."""
        metric = self._copy()
        for part, state, rules in zip(submetrics(metric), states, self.rules, strict=True):
            put_state(part, state, rules)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                result = metric.compute()
        except Exception as error:
            error.add_note(f"while {self._who} computed the metric {self._name!r}")
            raise
        values = self._numbers(result)
        self.names = list(values)
        return values

    def _names_at_first(self) -> list[str]:
        """The names as far as they can be known before the first update.

        Raises:
            MetricValueError: the value is known to be no single number.
        """
        try:
            with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                result = self._copy().compute()
        except Exception:  # many need data
            result = None
        values = list(result.values()) if isinstance(result, Mapping) else [result]
        if result is not None and not any(_size(value) == 0 for value in values):
            return list(self._numbers(result))
        if is_collection(self._metric):
            keys: Iterable[Any] = self._metric.keys()  # type: ignore[operator]  # a method
            return [self._joined_name(key) for key in keys]
        return [self._name, f"{self._name}/*"]

    def _copy(self) -> MetricLike:
        # But for the weights of networks that some metrics have in them.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self._metric.parameters()}
        return copy.deepcopy(self._metric, memo)

    def _numbers(self, result: Any) -> dict[str, float]:
        values = result if isinstance(result, Mapping) else {"": result}
        return {
            (name := self._joined_name(key)): self._number(name, value)
            for key, value in values.items()
        }

    def _joined_name(self, key: Any) -> str:
        return "/".join(part for part in (self._name, str(key)) if part)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            return float(value)
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise MetricValueError(
            f"{self._who}: the metric {name!r} computes a {type(value).__name__}{shape}, where a "
            "single number or a flat mapping of numbers is needed; have it averaged "
            "(average='macro'), wrap it in torchmetrics' ClasswiseWrapper, or write a metric "
            "whose compute() picks the numbers"
        )


def submetrics(metric: MetricLike) -> list[Metric]:
    """A metric and those in it, always in the same order."""
    from torchmetrics import Metric

    return [module for module in metric.modules() if isinstance(module, Metric)]


def is_collection(metric: MetricLike) -> bool:
    """Whether it names metrics of its own."""
    from torchmetrics import MetricCollection

    return isinstance(metric, MetricCollection)


def _size(value: Any) -> int:
    """The number of elements; 1 of what is no tensor or sequence."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    return len(value) if isinstance(value, (list, tuple)) else 1


MetricsLike: TypeAlias = "Mapping[str, MetricLike] | MetricCollection"
"""Metrics by name, or a collection, which names its own."""
MetricStates: TypeAlias = list[MetricState]
"""What all metrics of a set have gathered; :meth:`TorchMetrics.merge` makes one of several."""

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
    >>> resolve(metrics.snapshot(metrics.pop_states(), "val/"))
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
            (part, rules_of(part)) for m in self._metrics.values() for part in submetrics(m)
        ]
        self._rules = [rules for _, rules in self._parts]

    def __len__(self) -> int:
        return len(self._metrics)

    def select(self, mergeable: bool) -> TorchMetrics:
        """A set of those of these metrics whose states :meth:`merge` can join, or of the others."""
        return self._copy_of(
            name
            for name, metric in self._metrics.items()
            if all(map(is_mergeable, submetrics(metric))) is mergeable
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

    def pop_states(self) -> MetricStates:
        """What was gathered since the last time; the metrics start anew."""
        try:
            return [take_state(metric, rules) for metric, rules in self._parts]
        except MetricValueError as error:
            raise MetricValueError(f"{self._who}: {error}") from None
        finally:
            self.reset()

    def merge(self, parts: Sequence[MetricStates]) -> MetricStates:
        """What was gathered in several parts of the data, as one."""
        return [
            merge_states(states, rules) for *states, rules in zip(*parts, self._rules, strict=True)
        ]

    def snapshot(
        self, gathered: MetricStates, prefix: str = "", suffix: str = ""
    ) -> MetricsSnapshot:
        """What was gathered, to be reduced over the ranks, read and computed.

        Args:
            gathered: by :meth:`pop_states` or :meth:`merge`.
            prefix: of the names of the values.
            suffix: of the same.
        """
        device = self._device or torch.device("cpu")
        tensors = pack(gathered, self._rules, device)
        return MetricsSnapshot(tensors, self._rules, self._computed, (prefix, suffix))

    def state_dict(self) -> dict[str, Any]:
        """What was gathered since :meth:`pop_states`, which goes on."""
        states = [take_state(metric, rules) for metric, rules in self._parts]
        return {"version": STATE_VERSION, "metrics": self.encode(states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            StateError: it is that of other metrics, or of another version.
        """
        gathered = self._gathered(state)
        for (metric, rules), of_metric in zip(self._parts, gathered, strict=True):
            put_state(metric, of_metric, rules)
            metric._update_count = of_metric.updates

    def _gathered(self, state: Mapping[str, Any]) -> MetricStates:
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"expected a state of {self._who}'s metrics of version {STATE_VERSION}, "
                f"found version {state.get('version')!r}"
            )
        return self.decode(state["metrics"])

    def merge_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One state of those of several ranks; of none, that of metrics that begin anew.

        Raises:
            StateError: it is that of other metrics, or of another version, or a metric that has
                gathered on several ranks can't go on as one.
        """
        if not states:
            return self._copy_of(self._metrics).state_dict()
        parts = [self._gathered(state) for state in states]
        self._refuse_apart(parts)
        return {"version": STATE_VERSION, "metrics": self.encode(self.merge(parts))}

    def _refuse_apart(self, parts: Sequence[MetricStates]) -> None:
        for number, (metric, _) in enumerate(self._parts):
            updated = sum(part[number].updates > 0 for part in parts)
            if updated > 1 and not is_mergeable(metric):
                raise StateError(
                    f"{self._who}: {type(metric).__name__} was gathering on {updated} ranks, and "
                    "can't go on with their samples on one; resume with as many processes as "
                    "before, or more, or from a checkpoint of a moment at which it gathers "
                    "nothing, such as the end of an epoch at which there is a logging point"
                )

    def encode(self, gathered: MetricStates | None) -> list[dict[str, Any]] | None:
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

    def decode(self, saved: Sequence[Mapping[str, Any]]) -> MetricStates:
        """What :meth:`encode` gave, where these metrics gather.

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
        return self.to_device(
            [MetricState(state["updates"], state["states"], state["parts"]) for state in saved],
            copy=True,
        )

    def to_device(self, gathered: MetricStates, copy: bool = False) -> MetricStates:
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
            merge_states(of_ranks, rules)
            for *of_ranks, rules in zip(*ranks, self._rules, strict=True)
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
