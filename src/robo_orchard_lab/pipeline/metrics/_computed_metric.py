"""Values of a metric of torchmetrics, computed on the CPU from states."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.metrics._metric_states import MetricState, put_state, rules_of
from robo_orchard_lab.pipeline.metrics.errors import MetricValueError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

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
