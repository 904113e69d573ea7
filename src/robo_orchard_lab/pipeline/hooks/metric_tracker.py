"""Hook that computes torchmetrics metrics on the training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field

from robo_orchard_core.utils.config import Function
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import join_by_rank
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.validation import MetricPart, given_or_built
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.metrics.torchmetrics import (
    MetricArguments,
    MetricInputs,
    MetricsLike,
    MetricStates,
    TorchMetrics,
)
from robo_orchard_lab.pipeline.state_schema import StateSchema

STATE_VERSION = 1
_PREFIX = "train/"
_SUFFIX = {"window": "", "epoch": "_epoch"}  # of the values over each span
_Span: TypeAlias = Literal["window", "epoch"]


class MetricTracker(PipelineHooks):
    """Metrics of torchmetrics over the training steps, accumulated on the device.

    - Ranks: all; metrics are merged over ranks.
    - Publishes: ``train/<metric>`` since the last logging point, and ``train/<metric>_epoch`` at
      the end of a completed epoch.
    - State: the metrics' states, merged over ranks when the world size changes.
    - Cost: one ``update`` of each metric per step; two if torchmetrics can't merge the metric's
      states, as for a correlation. No device sync, except by metrics that sync themselves:
      classification metrics without ``validate_args=False``, or with logits or probabilities.

    A metric with random numbers in its update (``BootStrapper``) consumes the training RNG.

    >>> from torchmetrics import MeanSquaredError
    >>> MetricTrackerConfig()(metrics={"mse": MeanSquaredError()}).name
    'MetricTracker'

    Args:
        cfg: options, and optionally the metrics.
        metrics: by name, or a collection; copied. Here or in the config.
        metric_inputs: ``metric_inputs(outputs, batch)`` returns the arguments of ``metric.update``
            as a tuple or a mapping. Here or in the config; by default the batch processor's method
            of this name, or the outputs and the targets of a pair (inputs, targets).

    Raises:
        PipelineConfigError: no metrics, an object that is not a torchmetrics metric, or an argument
            given both here and in the config.
        MetricValueError: the value of a metric is known not to be a single number.
    """

    keeps_trajectory = True
    reads = ("batch", "model_outputs")
    changes = ("metrics",)
    requests = ()

    def __init__(
        self,
        cfg: MetricTrackerConfig,
        *,
        metrics: MetricsLike | None = None,
        metric_inputs: MetricInputs | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        given = given_or_built(metrics, cfg.metrics, "metrics", self.name)
        all_metrics = TorchMetrics(given, self.name)
        if not len(all_metrics):
            raise PipelineConfigError(
                f"{self.name}: metrics is empty; write metrics={{'accuracy': ...}}"
            )
        mergeable = all_metrics.select(mergeable=True)
        self._merged = _MergeableMetrics(mergeable, _SUFFIX if cfg.each_epoch else ["window"])
        self._window = all_metrics.select(mergeable=False)
        self._epoch = all_metrics.select(mergeable=False) if cfg.each_epoch else TorchMetrics(None)
        self._sets: dict[str, _MergeableMetrics | TorchMetrics] = {
            "merged": self._merged,
            "window": self._window,
            "epoch": self._epoch,
        }
        self._metric_inputs: MetricInputs | None = given_or_built(
            metric_inputs, cfg.metric_inputs, "metric_inputs", self.name
        )
        self._arguments: MetricArguments | None = None
        self.register_for_loop(self._open)
        self.on_batch.after(self._update)
        if cfg.each_epoch:
            self.on_epoch.after(self._end_epoch)

    @property
    def published_metrics(self) -> Sequence[str]:  # type: ignore[override]  # read-only here
        names = [*self._merged.live.names(), *self._window.names()]
        suffixes = ("", "_epoch") if self.cfg.each_epoch else ("",)
        return [f"{_PREFIX}{name}{suffix}" for name in names for suffix in suffixes]

    def _open(self, args: PipelineHookArgs) -> RemovableHandle:
        self._arguments = MetricArguments(self._metric_inputs, args.batch_processor, self.name)
        for metrics in self._sets.values():
            metrics.to(args.accelerator.device)
        return args.metrics.before_logging(partial(self._publish, args.metrics, "window"), self)

    def _update(self, args: PipelineHookArgs) -> None:
        if args.exception is None and self._arguments is not None and not args.is_padding_step:
            inputs, named = self._arguments(args.model_outputs, args.batch)
            self._merged.live.update(*inputs, **named)
            self._window.update(*inputs, **named)
            self._epoch.update(*inputs, **named)

    def _publish(self, board: MetricsBoard, span: _Span) -> None:
        """Publish the metrics over a span, and begin the next one."""
        affixes = _PREFIX, _SUFFIX[span]
        if len(self._merged.live):
            board.defer(self._merged.live.snapshot(self._merged.pop(span), *affixes))
        separate = self._window if span == "window" else self._epoch
        if len(separate):
            board.defer(separate.snapshot(separate.pop_states(), *affixes))

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None:
            self._publish(args.metrics, "epoch")
            if not args.metrics.is_logged:  # else the window would grow with the run
                self._merged.ended["window"] = None
                self._window.reset()

    state_schema = StateSchema(STATE_VERSION, merged=Any, window=Any, epoch=Any)

    def check_state(self, state: Any, model: torch.nn.Module) -> None:
        super().check_state(state, model)
        for name, metrics in self._sets.items():
            metrics.check(state[name])

    def state_dict(self) -> dict[str, Any]:
        states = {name: metrics.state_dict() for name, metrics in self._sets.items()}
        return {"version": STATE_VERSION, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        for name, metrics in self._sets.items():
            metrics.load_state_dict(state[name])

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        """Merge the states of all ranks: a metric is over the samples of all ranks."""
        return join_by_rank(states, processes, self._merge_states)

    def _merge_states(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        merged = {
            name: metrics.merge_state_dicts([state[name] for state in states])
            for name, metrics in self._sets.items()
        }
        return {"version": STATE_VERSION, **merged}


class MetricTrackerConfig(PipelineHooksConfig[MetricTracker]):
    """Metrics to track, unless passed to the hook, and options.

    >>> MetricTrackerConfig(each_epoch=False).each_epoch
    False
    """

    class_type: type[MetricTracker] = MetricTracker
    each_epoch: bool = Field(
        default=True,
        description="Publish the metrics of each epoch, too; their states are kept for an epoch.",
    )
    metrics: dict[str, MetricPart] | None = Field(
        default=None, description="Metrics by name, unless passed to the hook."
    )
    metric_inputs: Function | None = Field(
        default=None,
        description="metric_inputs(outputs, batch) returns the arguments of metric.update, "
        "unless passed to the hook; None for the batch processor's method.",
    )


class _MergeableMetrics:
    """Metrics with one update per step, merged into the states of each span.

    The end of a span ends a segment, merged into all spans.
    """

    def __init__(self, live: TorchMetrics, spans: Iterable[str]) -> None:
        self.live = live
        self.ended: dict[str, MetricStates | None] = dict.fromkeys(spans)  # ended segments

    def to(self, device: torch.device) -> None:
        self.live.to(device)
        for span, states in self.ended.items():
            self.ended[span] = states and self.live.to_device(states)

    def pop(self, span: _Span) -> MetricStates:
        """Return the states of a span, and begin the next one."""
        segment = self.live.pop_states()
        merged = {
            name: segment if ended is None else self.live.merge([ended, segment])
            for name, ended in self.ended.items()
        }
        self.ended = {**merged, span: None}
        return merged[span]

    def state_dict(self) -> dict[str, Any]:
        ended = {span: self.live.encode(self.ended.get(span)) for span in _SUFFIX}
        return {"live": self.live.state_dict(), **ended}

    def check(self, state: Any) -> None:
        StateSchema(live=Any, window=Any, epoch=Any).check(state, "merged")
        self.live.check(state["live"])
        for span in _SUFFIX:
            if state[span] is not None:
                self.live.decode(state[span])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ended = {  # decoded first: `check` compared them with the live states, too
            span: None if state[span] is None else self.live.decode(state[span])
            for span in self.ended
        }
        self.live.load_state_dict(state["live"])
        self.ended = ended

    def merge_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the states of several ranks."""
        merged: dict[str, Any] = {
            "live": self.live.merge_state_dicts([state["live"] for state in states])
        }
        for span in _SUFFIX:
            loaded = [self.live.decode(s[span]) for s in states if s[span] is not None]
            merged[span] = self.live.encode(self.live.merge(loaded)) if loaded else None
        return merged
