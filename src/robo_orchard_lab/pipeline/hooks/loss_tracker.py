"""Publish the loss, and the losses that it is made of, as means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import joined_by_rank
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics import MetricsBoard, WeightedSum
from robo_orchard_lab.pipeline.metrics.accumulators import Number, check_scalar

# --- loss mean -------------------------------------------------------------------------------
# The mean of one loss, for the price of one small copy a step.


_SLOTS = 64


class LossMean:
    """The weighted mean of a loss since the last logging point, and since the epoch began.

    The losses of the latest steps are copied into slots on their device, and added up when these
    are full or a mean is asked for; so are weights that are tensors. A copy is made at once, since
    a captured CUDA graph writes its next loss over the last one. On a CPU it takes 0.9 us; to add
    to a sum in double precision takes 2.3 us.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._window = WeightedSum()
        self._epoch = WeightedSum()
        self._rows: torch.Tensor | None = None  # where the slots are
        self._slots: list[torch.Tensor] = []  # of losses
        self._weight_slots: list[torch.Tensor] = []  # of those weights that are tensors
        self._weights: list[float | None] = []  # of the losses in the slots; None of a tensor

    def add(self, loss: Number, weight: Number) -> None:
        """On the step path: take in a number, or a detached tensor of one element.

        Args:
            loss: on any device.
            weight: a number, or a tensor without dimensions.
        """
        if not isinstance(loss, torch.Tensor):
            self._take(check_scalar(self._name, loss), weight)
            return
        used = len(self._weights)
        if used == len(self._slots):  # none is left, or there are none yet
            self._make_room(loss.device)
            used = 0
        if loss.dim():
            loss = torch.as_tensor(check_scalar(self._name, loss)).reshape(())
        self._slots[used].copy_(loss)
        if isinstance(weight, torch.Tensor):
            self._weight_slots[used].copy_(weight)
            self._weights.append(None)
        else:
            self._weights.append(weight)

    def publish_window(self, board: MetricsBoard) -> None:
        """Publish the mean since the last time, and begin anew."""
        self._add_up()
        window, self._window = self._window, WeightedSum()
        if not window.is_empty:
            board.publish_total(self._name, window)

    def publish_epoch(self, board: MetricsBoard) -> None:
        """Publish the mean since the epoch began, and begin anew."""
        self._add_up()
        epoch, self._epoch = self._epoch, WeightedSum()
        if not epoch.is_empty:
            board.publish_total(f"{self._name}_epoch", epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that was taken in."""
        # Not added up ahead: the run that goes on would then round otherwise than one not saved.
        used = len(self._weights)
        return {
            "window": self._window.state_dict(),
            "epoch": self._epoch.state_dict(),
            "rows": self._rows[:, :used].clone() if self._rows is not None and used else None,
            "weights": list(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a state, with its tensors on ``device``."""
        self._window.load_state_dict(state["window"], device)
        self._epoch.load_state_dict(state["epoch"], device)
        self._weights = list(state["weights"])
        if self._weights:
            self._make_slots(device)[:, : len(self._weights)].copy_(state["rows"])

    def merge(self, other: LossMean) -> None:
        """Take in what another one, of a later rank, has taken in."""
        for mean in (self, other):
            mean._add_up()
        self._window.merge(other._window)
        self._epoch.merge(other._epoch)

    def _make_room(self, device: torch.device) -> None:
        self._add_up()
        if not self._slots:
            self._make_slots(device)

    def _make_slots(self, device: torch.device) -> torch.Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._rows = torch.zeros(2, _SLOTS, dtype=dtype, device=device)
        self._slots, self._weight_slots = (list(row.unbind()) for row in self._rows)
        return self._rows

    def _add_up(self) -> None:
        """Take in what is in the slots; stretches of one weight together."""
        begin = 0
        for weight, count in _stretches(self._weights):
            end = begin + count
            assert self._rows is not None  # since something is in it
            losses, weights = self._rows[:, begin:end]
            if weight is None:
                # The mean over nothing may be NaN.
                products = torch.where(weights > 0, losses * weights, 0.0)
                self._merge(products.sum(), weights.sum())
            else:
                self._take(losses.mean(), weight * count)
            begin = end
        self._weights = []

    def _take(self, mean: Number, weight: Number) -> None:
        self._window.add(mean, weight)
        self._epoch.add(mean, weight)

    def _merge(self, total: torch.Tensor, weight: torch.Tensor) -> None:
        part = WeightedSum()
        part.tensor, part.tensor_weight = total, weight
        self._window.merge(part)
        self._epoch.merge(part)


def _stretches(weights: list[float | None]) -> list[tuple[float | None, int]]:
    """The weights one after the other, each with how often it follows itself."""
    if weights and weights.count(weights[0]) == len(weights):  # as good as always, and in C
        return [(weights[0], len(weights))]
    return [(weight, len(list(stretch))) for weight, stretch in groupby(weights)]


# --- named losses ----------------------------------------------------------------------------
# Find the named losses in what a batch processor returns as outputs.


def named_losses(outputs: Any, key: str, names: Sequence[str] | None) -> Iterable[tuple[str, Any]]:
    """Pairs of a name and a loss.

    >>> outputs = {"boxes": [], "losses": {"box": 0.5, "class": 2.0}}
    >>> list(named_losses(outputs, "losses", None))
    [('box', 0.5), ('class', 2.0)]

    Args:
        outputs: a mapping, or an object with attributes, that has the mapping of losses.
        key: where in the outputs it is; '' where they are that mapping themselves.
        names: which of the losses to give; None for all.

    Raises:
        PipelineConfigError: there is no mapping, or it has none of such a name.
    """
    losses = _part_of(outputs, key) if key else outputs
    if not isinstance(losses, Mapping):
        raise _no_mapping(outputs, key, losses)
    if names is None:
        return losses.items()
    try:
        return [(name, losses[name]) for name in names]
    except KeyError as error:
        raise _no_such_loss(str(error.args[0]), losses) from None


def _part_of(outputs: Any, key: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(key)
    return getattr(outputs, key, None)


def _no_mapping(outputs: Any, key: str, found: Any) -> PipelineConfigError:
    parts = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    return PipelineConfigError(
        f"losses_key={key!r} must lead to a mapping from names to losses, found "
        f"{type(found).__name__}. The outputs of the batch processor are a "
        f"{type(outputs).__name__} with: {', '.join(map(str, parts)) or 'no names'}. "
        "Give the name of its mapping, or '' where the outputs are that mapping themselves"
    )


def _no_such_loss(name: str, losses: Mapping[Any, Any]) -> PipelineConfigError:
    near = difflib.get_close_matches(name, map(str, losses), n=1)
    return PipelineConfigError(
        f"loss_names has {name!r}, which is not among the losses"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" They are: {', '.join(map(str, losses)) or 'none'}"
    )


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
    ...     run.metrics.flush(log=True).values
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
        if loss is not None and args.exception is None and not args.is_padding_step:
            self._total.add(loss.data, args.loss_weight)  # half the time of detach()

    def _add_named(self, args: PipelineHookArgs) -> None:
        """On the step path."""
        if args.exception is not None or args.is_padding_step:
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
        check_state_version(state, STATE_VERSION, self.name)
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
