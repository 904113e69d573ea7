"""Hooks that publish given values of a metric, one a step, for hooks that wait for some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.metrics import DeferredMetrics

NAME = "eval/val/loss"


class Logged(PipelineHooks):
    """Publishes a value in each step, and asks for a logging point; None for neither."""

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
    """Asks for an evaluation in each step, which defers a value, as a validation does."""

    def __init__(self, values: Sequence[float | None], name: str = NAME) -> None:
        super().__init__(f"evaluates {name}")
        self.values, self.metric = values, name
        self.on_loop.before(self._begin)
        self.on_step.after(self._ask)

    def _begin(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = self._evaluate

    def _ask(self, args: PipelineHookArgs) -> None:
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
