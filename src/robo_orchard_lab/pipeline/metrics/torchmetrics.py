"""Metrics of torchmetrics, whose states travel with everything else that is published."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction
from robo_orchard_lab.pipeline.metrics.window import MetricValueError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


# --- metric states ---------------------------------------------------------------------------
# What a torchmetrics metric has gathered: taken out, joined, packed, and put back.


Joining: TypeAlias = Literal["sum", "mean", "max", "min", "cat"] | Callable[[Any], Any] | None
"""What makes one state of those of several parts: elementwise; ``cat``, along the first dimension;
a function of the parts, stacked; None: the parts, stacked. The elements of a list state are
gathered instead of stacked."""

_ELEMENTWISE: Mapping[Joining, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True, slots=True)
class StateRule:
    """How the parts of one state are joined."""

    joining: Joining
    is_list: bool

    def join(self, parts: Sequence[tuple[int, list[torch.Tensor]]]) -> list[torch.Tensor]:
        """Of the states of several parts, and how often each was updated, >= 1."""
        if self.is_list or self.joining in ("cat", None) or callable(self.joining):
            return [element for _, elements in parts for element in elements]
        values = [elements[0] for _, elements in parts]
        if self.joining in _ELEMENTWISE:
            return [reduce(_ELEMENTWISE[self.joining], values)]
        total = sum(updates for updates, _ in parts)
        weighted = [value * (updates / total) for value, (updates, _) in zip(values, parts)]  # noqa: B905 - one is made of the other
        return [reduce(torch.add, weighted)]

    def gathered(self, elements: list[torch.Tensor]) -> list[torch.Tensor]:
        """The elements, or what they are as one where it makes no difference."""
        return _concatenated(elements) if self.joining == "cat" else elements

    def final(self, elements: list[torch.Tensor], parts: int) -> Any:
        """What the metric itself has in the place of this state, as torchmetrics would set it."""
        if self.is_list:
            if parts > 1 and callable(self.joining):
                return self.joining(elements)
            return list(self.gathered(elements))
        if self.joining == "cat":
            return _concatenated(elements)[0]
        if parts == 1 or isinstance(self.joining, str):
            return elements[0]
        stacked = torch.stack(elements)
        return stacked if self.joining is None else self.joining(stacked)


Rules: TypeAlias = Mapping[str, StateRule]
"""Of one metric, by the name of the state."""


@dataclass(slots=True)
class MetricState:
    """What one metric has gathered."""

    updates: int
    """How often it was updated."""
    states: dict[str, list[torch.Tensor]]
    """The elements of each state, one of a tensor; those of ``cat`` are yet to be concatenated."""
    parts: int = field(default=1)
    """How many were joined, each of which was updated."""


def rules_of(metric: Metric) -> Rules:
    """How the states of a metric are joined, as it declares it."""
    from torchmetrics.utilities import (
        dim_zero_cat,
        dim_zero_max,
        dim_zero_mean,
        dim_zero_min,
        dim_zero_sum,
    )

    known: Mapping[Any, Any] = {
        dim_zero_sum: "sum",
        dim_zero_mean: "mean",
        dim_zero_max: "max",
        dim_zero_min: "min",
        dim_zero_cat: "cat",
    }
    rules = {}
    for name, declared in metric._reductions.items():
        joining: Joining = known.get(declared, declared)
        rules[name] = StateRule(joining, is_list=isinstance(metric._defaults[name], list))
    return rules


def parts_make_the_whole(metric: Metric) -> bool:
    """Whether what it gathers in two parts of the data makes what it would have gathered in both.

    This is where torchmetrics itself merges states; other metrics may make one of several ranks'
    states only in the end, or their updates may depend on those before.
    """
    rules = rules_of(metric).values()
    return (
        metric.full_state_update is False
        and not metric.dist_sync_on_step
        and all(
            isinstance(rule.joining, str) or (rule.is_list and rule.joining is None)
            for rule in rules
        )
    )


def take_state(metric: Metric, rules: Rules) -> MetricState:
    """What it has gathered, without a copy; to be followed by a reset, which makes new tensors.

    Raises:
        MetricValueError: a state holds something else than tensors of numbers.
    """
    states = {}
    for name in rules:
        value = getattr(metric, name)
        states[name] = list(value) if isinstance(value, list) else [value]
        for element in states[name]:
            if not isinstance(element, torch.Tensor) or element.dtype not in _DTYPES:
                kind = getattr(element, "dtype", type(element).__name__)
                raise MetricValueError(
                    f"the state {name!r} of {type(metric).__name__} holds a {kind}, which can't be "
                    "read with the other metrics; only tensors of numbers can"
                )
    return MetricState(metric.update_count, states)


def put_state(metric: Metric, state: MetricState, rules: Rules) -> None:
    """Have the metric be what gathered the state."""
    for name, rule in rules.items():
        setattr(metric, name, rule.final(state.states[name], state.parts))
    metric._update_count = max(1, state.updates)  # or its compute would warn
    metric._computed = None


def joined(parts: Sequence[MetricState], rules: Rules) -> MetricState:
    """One state of several; those that were never updated count for nothing."""
    updated = [part for part in parts if part.updates]
    if len(updated) <= 1:
        return updated[0] if updated else parts[0]
    return MetricState(
        sum(part.updates for part in updated),
        {
            name: rule.join([(part.updates, part.states[name]) for part in updated])
            for name, rule in rules.items()
        },
        sum(part.parts for part in updated),
    )


def pack(
    states: Sequence[MetricState], rules: Sequence[Rules], device: torch.device
) -> list[torch.Tensor]:
    """All states as two tensors: where what is, and all bytes, on ``device``.

    Those of several ranks, concatenated, go back into the states of each by :func:`unpack`. They
    need not have the same shapes. A state that is that of another metric, as in the compute groups
    of a collection, is there once.
    """
    header: list[int] = []
    bytes_: list[torch.Tensor] = []
    seen: dict[tuple[int, ...], int] = {}
    index = 0
    for state, of_metric in zip(states, rules, strict=True):
        header += [state.updates, state.parts]
        for name, rule in of_metric.items():
            elements = state.states[name]
            first = seen.setdefault(tuple(map(id, elements)), index) if elements else index
            index += 1
            if first < index - 1:
                header.append(-1 - first)
                continue
            elements = rule.gathered(elements)
            header.append(len(elements))
            for element in elements:
                header += [_DTYPES.index(element.dtype), element.dim(), *element.shape]
                flat = element.reshape(-1).contiguous()
                bytes_.append(flat.view(torch.uint8).to(device))
    packed = torch.cat(bytes_) if bytes_ else torch.zeros(0, dtype=torch.uint8, device=device)
    return [torch.tensor(header, dtype=torch.int64), packed]


def unpack(
    header: torch.Tensor, packed: torch.Tensor, rules: Sequence[Rules]
) -> list[list[MetricState]]:
    """The states of each rank, of what :func:`pack` made there, concatenated."""
    ranks = []
    numbers, begin = iter(header.tolist()), 0
    for updates in numbers:
        states, begin = _unpacked(updates, numbers, packed, begin, rules)
        ranks.append(states)
    return ranks


def _unpacked(
    updates: int,
    numbers: Iterator[int],
    packed: torch.Tensor,
    begin: int,
    rules: Sequence[Rules],
) -> tuple[list[MetricState], int]:
    """One rank's states, from its second number on, and where its bytes end."""
    states: list[MetricState] = []
    known: list[list[torch.Tensor]] = []
    for of_metric in rules:
        if states:
            updates = next(numbers)
        state = MetricState(updates, {}, next(numbers))
        for name in of_metric:
            count = next(numbers)
            elements = known[-1 - count] if count < 0 else []
            for _ in range(count):
                dtype = _DTYPES[next(numbers)]
                shape = torch.Size([next(numbers) for _ in range(next(numbers))])
                end = begin + shape.numel() * dtype.itemsize
                # A copy, whose first byte lies where any dtype may begin.
                elements.append(packed[begin:end].clone().view(dtype).reshape(shape))
                begin = end
            known.append(elements)
            state.states[name] = elements
        states.append(state)
    return states, begin


def _concatenated(elements: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if len(elements) <= 1:
        return list(elements)
    return [torch.cat([e.reshape(1) if e.dim() == 0 else e for e in elements])]


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
        self.rules = [rules_of(part) for part in metrics_within(metric)]
        for part in metrics_within(metric):
            part.sync_on_compute = part._to_sync = False  # or its compute would talk to other ranks
        self.names = self._names_at_first()

    def __call__(self, states: Sequence[MetricState]) -> dict[str, float]:
        """The values by name; of all ranks alike, also where computing draws random numbers."""
        metric = self._copy()
        for part, state, rules in zip(metrics_within(metric), states, self.rules, strict=True):
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


def metrics_within(metric: MetricLike) -> list[Metric]:
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
