"""From the outputs and the batch of a step to what a metric is updated with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import PipelineConfigError

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
