"""Publish the loss, and the losses that it is made of, as means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import joined_by_rank
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks._loss_mean import LossMean
from robo_orchard_lab.pipeline.hooks._named_losses import named_losses
from robo_orchard_lab.pipeline.metrics import MetricsBoard

STATE_VERSION = 2
_TOTAL = "total"


class LossTracker(PipelineHooks):
    """Publishes the mean loss since the last logging point, and that of each whole epoch.

    ``loss/total`` is the loss that the batch processor returns, ``loss/<name>`` one of the named
    losses in its outputs; ``loss/total_epoch`` and the like are published when an epoch is
    completed. Each batch weighs ``args.loss_weight``: its samples, or what the processor says. A
    loss that is no number makes its means NaN, also where a guard has skipped the update.

    It runs on every rank and takes 3 us a step on a CPU, 2.2 us more for each named loss; where the
    processor says what they weigh, each of these takes 0.6 us more. Nothing is read from the
    device; the means of the ranks meet at the logging point.

    >>> from robo_orchard_lab.pipeline.context import PipelineRun
    >>> run, tracker = PipelineRun(), LossTrackerConfig()()
    >>> with tracker.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (1.0, 2.0):
    ...         args = PipelineHookArgs(run, attached_loss=torch.tensor(loss))
    ...         with tracker.begin("on_step", args):
    ...             pass
    ...     run.metrics.settle(log=True).values
    (MetricValue(name='loss/total', value=1.5, step=0),)
    """

    keeps_trajectory = True

    def __init__(self, cfg: LossTrackerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._total = LossMean(f"loss/{_TOTAL}")
        self._named: dict[str, LossMean] = {}
        self._board: MetricsBoard | None = None
        self._before_logging: RemovableHandle | None = None
        self._loaded: Mapping[str, Any] | None = None  # until the loop says on which device
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        self.register_hook("on_epoch", HookContext.from_callable(after=self._end_epoch))
        self.register_hook("on_step", HookContext.from_callable(after=self._add_total))
        if cfg.losses_key is not None:
            self.register_hook("on_step", HookContext.from_callable(after=self._add_named))

    def _begin(self, args: PipelineHookArgs) -> None:
        self._board = args.metrics
        self._before_logging = args.metrics.before_logging(self._publish_windows, self)
        if self._loaded is not None:
            self._place(self._loaded, args.accelerator.device)
            self._loaded = None

    def _end(self, args: PipelineHookArgs) -> None:
        if self._before_logging is not None:
            self._before_logging.remove()

    def _add_total(self, args: PipelineHookArgs) -> None:
        """On the step path."""
        loss = args.attached_loss
        if loss is not None and args.exception is None and not args.is_filler:
            self._total.add(loss.data, args.loss_weight)  # half the time of detach()

    def _add_named(self, args: PipelineHookArgs) -> None:
        """On the step path."""
        if args.exception is not None or args.is_filler:
            return
        cfg, weight = self.cfg, args.loss_weight
        assert cfg.losses_key is not None  # else this is not registered
        for name, loss in named_losses(args.model_outputs, cfg.losses_key, cfg.loss_names):
            mean = self._named.get(name)
            if mean is None:
                mean = self._open(name)
            mean.add(loss.detach() if isinstance(loss, torch.Tensor) else loss, weight)

    def _open(self, name: str) -> LossMean:
        if name == _TOTAL:
            raise PipelineConfigError(
                f"{self.name}: the outputs have a loss named {_TOTAL!r}, as the loss that the "
                "batch processor returns is called; rename it, or leave it out by loss_names"
            )
        mean = self._named[name] = LossMean(f"loss/{name}")
        return mean

    def _publish_windows(self) -> None:
        assert self._board is not None  # since the loop began
        for mean in (self._total, *self._named.values()):
            mean.publish_window(self._board)

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None:
            for mean in (self._total, *self._named.values()):
                mean.publish_epoch(args.metrics)

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return dict(self._loaded)
        return {
            "version": STATE_VERSION,
            "total": self._total.state_dict(),
            "named": {name: mean.state_dict() for name, mean in self._named.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"{self.name}: expected a state of version {STATE_VERSION}, "
                f"found version {state.get('version')!r}"
            )
        self._loaded = state

    def redistribute_states(
        self, states: Sequence[Mapping[str, Any]], processes: int
    ) -> Sequence[Mapping[str, Any]]:
        """Each mean is that of all ranks' samples, whichever rank has taken them in."""
        return joined_by_rank(states, processes, self._joined)

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        whole = LossTracker(self.cfg)
        for state in states:
            whole._merge(state)
        return whole.state_dict()

    def _merge(self, state: Mapping[str, Any]) -> None:
        other = LossTracker(self.cfg)
        other.load_state_dict(state)
        other._place(state, torch.device("cpu"))
        self._total.merge(other._total)
        for name, mean in other._named.items():
            (self._named.get(name) or self._open(name)).merge(mean)

    def _place(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._total.load_state_dict(state["total"], device)
        self._named = {}
        for name, saved in state["named"].items():
            self._open(name).load_state_dict(saved, device)


class LossTrackerConfig(PipelineHooksConfig[LossTracker]):
    """Which losses to track beside the total.

    Where the batch processor returns ``{"boxes": ..., "losses": {"box": ..., "class": ...}}`` as
    its outputs, ``losses_key="losses"`` has ``loss/box`` and ``loss/class`` published. Where the
    outputs are the losses, as those of torchvision's detectors and many policies, it is ``""``.

    >>> LossTrackerConfig(losses_key="losses")().name
    'LossTracker'
    """

    class_type: type[LossTracker] = LossTracker
    losses_key: str | None = Field(
        default=None,
        description="The key or attribute of the outputs that holds a mapping from names to "
        "losses, each a number or a tensor of one element; '' where the outputs are that mapping "
        "themselves; by default only the total is tracked.",
    )
    loss_names: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which of these losses to track; each has to be there in every step. By "
        "default all that are there.",
    )

    def __post_init__(self) -> None:
        if self.loss_names is not None and self.losses_key is None:
            raise ValueError(
                f"loss_names={self.loss_names} needs losses_key, which says where the losses are"
            )
