"""Hooks that publish given values of a metric, one per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.metrics import DeferredMetrics

NAME = "eval/val/loss"


class Logged(PipelineHooks):
    """Hook that publishes a value per step and requests a logging point; None does nothing."""

    def __init__(self, values: Sequence[float | None], name: str = NAME) -> None:
        super().__init__(f"publishes {name}")
        self.values, self.metric = values, name
        self.on_step.after(self._publish)

    def _publish(self, args: PipelineHookArgs) -> None:
        value = self.values[args.global_step_id]
        if value is not None:
            args.metrics.publish(self.metric, value, reduce="last")
            args.requests.log("it is time", by=self.name)


class Evaluated(PipelineHooks):
    """Hook that requests an evaluation per step, with a deferred value as in a validation."""

    def __init__(self, values: Sequence[float | None], name: str = NAME) -> None:
        super().__init__(f"evaluates {name}")
        self.values, self.metric = values, name
        self.on_loop.before(self._begin)
        self.on_step.after(self._request)

    def _begin(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = self._evaluate

    def _request(self, args: PipelineHookArgs) -> None:
        if self.values[args.global_step_id] is not None:
            args.requests.evaluate("it is time", by=self.name)

    def _evaluate(self, args: PipelineHookArgs) -> None:
        value = self.values[args.global_step_id - 1]
        assert value is not None
        args.metrics.defer(_Value(self.metric, value))


class _Value(DeferredMetrics):
    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def names(self) -> Sequence[str]:
        return [self.name]

    def states(self) -> Sequence[tuple[torch.Tensor, Any]]:
        return [(torch.tensor(self.value, dtype=torch.float64), "max")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        return {self.name: float(reduced[0])}
