"""Hook that publishes mean losses; `LossMean` accumulates one loss."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from pydantic import Field

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import join_by_rank
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.metrics import MetricsBoard, WeightedSum
from robo_orchard_lab.pipeline.metrics.accumulators import Number, check_scalar, host_value
from robo_orchard_lab.pipeline.state_schema import Real, StateSchema, mapping_of

_SLOTS = 64
_SUFFIX = {"window": "", "epoch": "_epoch"}  # of the names of the means


def _check_rows(state: Mapping[str, Any]) -> None:
    rows, used = state["rows"], len(state["weights"])
    is_valid = rows is not None and rows.shape == (2, used) and rows.is_floating_point()
    if used > _SLOTS or (used and not is_valid):
        raise ValueError(f"expected two rows with {used} of at most {_SLOTS} losses")


class LossMean:
    """Weighted means of a loss since the last logging point and since the start of the epoch.

    Numbers and CPU tensors are read at once, and added on the host. Losses on a device are copied
    into slots there; so are tensor weights. The copy is immediate, since a captured CUDA graph
    overwrites its loss in the next step. Sums are made when the slots are full or a mean is read.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sums = {span: WeightedSum() for span in _SUFFIX}
        self._recent = array("d")  # losses on the host, which are not in the sums yet
        self._recent_weights = array("d")
        self._rows: torch.Tensor | None = None  # storage of the slots: losses, weights
        self._slots: list[torch.Tensor] = []  # of losses
        self._weight_slots: list[torch.Tensor] = []  # of tensor weights
        self._weights: list[float | None] = []  # of the filled slots; None for a tensor
        self._checked = 0  # slots that are in the sum below
        self._since_check: Number = 0.0  # non-finite if a loss since the last check is

    def add(self, loss: Number, weight: Number) -> None:
        """Add the loss of a batch, a number or a one-element tensor; on the step path."""
        value: Any = None
        if not isinstance(loss, torch.Tensor):
            value = check_scalar(self._name, loss)
        elif not self._slots:
            value = host_value(loss)
        if value is None:
            self._fill_slot(loss, weight)
            return
        if isinstance(weight, torch.Tensor):
            number = host_value(weight)
            if number is None:
                self._since_check = self._since_check + value
                self._add_to_sums(value, weight)
                return
            weight = number
            if not weight > 0:  # the mean loss of an empty batch may be NaN
                value = 0.0
        self._recent.append(value)
        self._recent_weights.append(weight)
        if len(self._recent) == _SLOTS:
            self._sum_recent()

    def _sum_recent(self) -> None:
        """Add the losses on the host to the sums; costs a third of adding each at its step."""
        for total in self._sums.values():
            host, host_weight = total.host, total.host_weight
            for value, weight in zip(self._recent, self._recent_weights, strict=True):
                host += value * weight
                host_weight += weight
            total.host, total.host_weight = host, host_weight
        self._since_check = self._since_check + sum(self._recent)
        del self._recent[:], self._recent_weights[:]

    def _fill_slot(self, loss: Any, weight: Number) -> None:
        used = len(self._weights)
        if used == len(self._slots):  # full, or not allocated yet
            self._sum_slots()
            used = 0
            if not self._slots:
                self._make_slots(loss.device)
        loss = loss.detach()
        if loss.dim():
            loss = torch.as_tensor(check_scalar(self._name, loss)).reshape(())
        self._slots[used].copy_(loss)
        if isinstance(weight, torch.Tensor):
            self._weight_slots[used].copy_(weight)
            self._weights.append(None)
        else:
            self._weights.append(weight)

    def check_finite(self) -> bool:
        """Return True if all losses since the last call are finite; a device sync."""
        self._sum_recent()
        self._sum_unchecked()
        total, self._since_check = self._since_check, 0.0
        return math.isfinite(total)

    def publish(self, board: MetricsBoard, span: Literal["window", "epoch"]) -> None:
        """Publish the mean since the last logging point or of the epoch, and reset it."""
        self._sum_slots()
        total, self._sums[span] = self._sums[span], WeightedSum()
        if not total.is_empty:
            board.publish_total(self._name + _SUFFIX[span], total)

    schema = StateSchema(
        then=_check_rows,
        window=WeightedSum.schema.type,
        epoch=WeightedSum.schema.type,
        rows=torch.Tensor | None,
        weights=list[Real | None],
    )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and the losses that are not summed yet."""
        # The slots are not summed first: saving must not change the rounding of later sums. The
        # losses on the host are added one by one at any time.
        self._sum_recent()
        used = len(self._weights)
        return {
            **{span: total.state_dict() for span, total in self._sums.items()},
            "rows": self._rows[:, :used].clone() if self._rows is not None and used else None,
            "weights": list(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a state, with tensors on ``device``."""
        for span, total in self._sums.items():
            total.load_state_dict(state[span], device)
        del self._recent[:], self._recent_weights[:]
        self._weights = list(state["weights"])
        self._since_check, self._checked = 0.0, len(self._weights)  # a checkpoint was checked
        if self._weights:
            self._make_slots(device)[:, : len(self._weights)].copy_(state["rows"])

    def merge(self, other: LossMean) -> None:
        """Add the losses of another mean, from a later rank."""
        for mean in (self, other):
            mean._sum_slots()
        for span, total in self._sums.items():
            total.merge(other._sums[span])

    def _make_slots(self, device: torch.device) -> torch.Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._rows = torch.zeros(2, _SLOTS, dtype=dtype, device=device)
        self._slots, self._weight_slots = (list(row.unbind()) for row in self._rows)
        return self._rows

    def _sum_slots(self) -> None:
        """Add recent losses and the filled slots to the sums, slots of equal weights together."""
        self._sum_recent()
        self._sum_unchecked()
        self._checked = 0
        begin = 0
        for weight, run in groupby(self._weights):
            count = len(list(run))
            assert self._rows is not None  # a slot is filled
            losses, weights = self._rows[:, begin : begin + count]
            begin += count
            if weight is not None:
                self._add_to_sums(losses.mean(), weight * count)
                continue
            part = WeightedSum()
            # The mean loss of an empty batch may be NaN.
            part.tensor = torch.where(weights > 0, losses * weights, 0.0).sum()
            part.tensor_weight = weights.sum()
            for total in self._sums.values():
                total.merge(part)
        self._weights = []
        # A CPU tensor with a dimension made the slots; a resumed run has none at this point either.
        if self._rows is not None and self._rows.is_cpu:
            self._rows, self._slots = None, []

    def _sum_unchecked(self) -> None:
        used = len(self._weights)
        if self._rows is not None and used > self._checked:
            losses, weights = self._rows[:, self._checked : used]
            if self._weights[-1] is None:  # the mean loss of an empty batch may be NaN
                losses = torch.where(weights > 0, losses, 0.0)
            self._since_check = self._since_check + losses.sum()
            self._checked = used

    def _add_to_sums(self, mean: Number, weight: Number) -> None:
        for total in self._sums.values():
            total.add(mean, weight)


def _named_losses(outputs: Any, key: str, names: Sequence[str] | None) -> Iterable[tuple[str, Any]]:
    """Return pairs of name and loss from the outputs of a batch processor; see the config."""
    losses: Any = outputs
    if key:
        is_mapping = isinstance(outputs, Mapping)
        losses = outputs.get(key) if is_mapping else getattr(outputs, key, None)
    if not isinstance(losses, Mapping):
        known = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
        raise PipelineConfigError(
            f"losses_key={key!r}: expected a mapping from names to losses, found "
            f"{type(losses).__name__}; the batch processor's outputs are a "
            f"{type(outputs).__name__} with: {', '.join(map(str, known)) or 'no names'}; set "
            "losses_key to the name of the mapping, or to '' if the outputs are the mapping"
        )
    if names is None:
        return losses.items()
    try:
        return [(name, losses[name]) for name in names]
    except KeyError as error:
        name, known = str(error.args[0]), [*map(str, losses)]
        raise PipelineConfigError(
            f"loss_names has {name!r}, expected names among: {', '.join(known) or 'none'}; "
            f"{suggest_name(name, known, 'use one of')}"
        ) from None


STATE_VERSION = 2
_TOTAL = "total"


class LossTracker(PipelineHooks):
    """Mean losses since the last logging point and over each epoch.

    The total loss is the one returned by the batch processor; named losses come from its outputs.
    Each batch is weighted by ``args.loss_weight``: its samples, or the processor's own weight. A
    non-finite loss makes its means NaN, also if a guard skipped the update.

    - Ranks: all; means are reduced over ranks at logging points.
    - Publishes: ``loss/total`` and ``loss/<name>`` at logging points, ``loss/total_epoch`` and
      ``loss/<name>_epoch`` at the end of a completed epoch. With several optimizers there is no
      total: each optimizer's loss has its name, and a step counts the last one.
    - State: sums and recent losses, merged over ranks when the world size changes.
    - Checkpoints: records if the losses since the checkpoint before are finite.
    - Cost: 1 us a step on a CPU, and 1 us for each named loss; on a device, a copy for each loss,
      and another if the processor returns weights. No device sync.

    >>> from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
    >>> run, tracker = PipelineRun.standalone(), LossTrackerConfig()()
    >>> with tracker.begin("on_loop", PipelineHookArgs(run)):
    ...     for loss in (1.0, 2.0):
    ...         args = PipelineHookArgs(run, attached_loss=torch.tensor(loss))
    ...         with tracker.begin("on_step", args):
    ...             pass
    ...     run.metrics.flush(log=True).values
    (MetricValue(name='loss/total', value=1.5, step=0),)
    """

    keeps_trajectory = True
    reads = ("loss", "losses", "loss_weight")
    changes = ("metrics",)
    requests = ()

    def __init__(self, cfg: LossTrackerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.losses_key is not None:
            self.declare_effects(reads=["model_outputs"])
        self._total = LossMean(f"loss/{_TOTAL}")
        self._named: dict[str, LossMean] = {}
        self._optimizers: list[str] = []  # names of several optimizers
        self._loaded: Mapping[str, Any] | None = None  # until the device is known
        self.register_for_loop(self._begin)
        self.on_epoch.after(self._end_epoch)
        self.on_step.after(self._add_total)
        if cfg.losses_key is not None:
            self.on_step.after(self._add_named)

    @property
    def published_metrics(self) -> Sequence[str]:  # type: ignore[override]  # read-only here
        named = self.cfg.loss_names or ["*"] * (self.cfg.losses_key is not None)
        named = [*named, *self._optimizers]
        return [f"loss/{name}{suffix}" for name in (_TOTAL, *named) for suffix in ("", "_epoch")]

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        if self._loaded is not None:
            self._restore(self._loaded, args.accelerator.device)
            self._loaded = None
        self._optimizers = args.run.optimizer_names
        args.run.loss_checks[self.name] = self._check_finite
        publish = partial(self._publish, args.metrics, "window")
        return args.metrics.before_logging(publish, self)

    def _check_finite(self) -> bool:
        means = [self._named[name] for name in self._optimizers if name in self._named]
        are_finite = [mean.check_finite() for mean in (self._total, *means)]  # resets all of them
        return all(are_finite)

    def _add_total(self, args: PipelineHookArgs) -> None:
        """Add the batch processor's loss, or the losses of optimizers; on the step path."""
        # Fields, not properties: where the model's data fills the caches, a call costs 1 us.
        loss = args.attached_loss
        weight: Number | None = args._given_loss_weight
        if args._exception is not None:
            return
        if args._loss_divisor == math.inf or args._batch_skip_reason is not None:  # padding
            return
        if weight is None:
            weight = args._batch_size or args.loss_weight
        if loss is not None:
            self._total.add(loss, weight)
            return
        for name, named in args.losses.items():
            mean = self._named.get(name)
            if mean is None:
                mean = self._named[name] = LossMean(f"loss/{name}")
            mean.add(named, weight)

    def _add_named(self, args: PipelineHookArgs) -> None:
        """Add the named losses; on the step path."""
        if args.exception is not None or args.is_padding_step:
            return
        cfg, weight = self.cfg, args.loss_weight
        assert cfg.losses_key is not None  # checked at registration
        for name, loss in _named_losses(args.model_outputs, cfg.losses_key, cfg.loss_names):
            mean = self._named.get(name)
            if mean is None or name in self._optimizers:
                mean = self._add_name(name)
            mean.add(loss, weight)

    def _add_name(self, name: str) -> LossMean:
        if name == _TOTAL or name in self._optimizers:
            owner = "the batch processor's own" if name == _TOTAL else "an optimizer's"
            raise PipelineConfigError(
                f"{self.name}: the outputs have a loss named {name!r}, the name of {owner} loss; "
                "rename it, or exclude it by loss_names"
            )
        mean = self._named[name] = LossMean(f"loss/{name}")
        return mean

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed and args.exception is None:
            self._publish(args.metrics, "epoch")

    def _publish(self, board: MetricsBoard, span: Literal["window", "epoch"]) -> None:
        for mean in (self._total, *self._named.values()):
            mean.publish(board, span)

    state_schema = StateSchema(
        STATE_VERSION,
        total=LossMean.schema.type,
        named=mapping_of(LossMean.schema),
    )

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
        """Merge the sums of all ranks: a mean is over the samples of all ranks."""
        return join_by_rank(states, processes, self._merged)

    def _merged(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        merged = LossTracker(self.cfg)
        for state in states:
            other = LossTracker(self.cfg)
            other.load_state_dict(state)
            other._restore(state, torch.device("cpu"))
            merged._total.merge(other._total)
            for name, mean in other._named.items():
                merged._named.setdefault(name, LossMean(f"loss/{name}")).merge(mean)
        return merged.state_dict()

    def _restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._total.load_state_dict(state["total"], device)
        self._named = {}
        for name, saved in state["named"].items():
            mean = self._named[name] = LossMean(f"loss/{name}")
            mean.load_state_dict(saved, device)


class LossTrackerConfig(PipelineHooksConfig[LossTracker]):
    """Losses to track in addition to the total.

    If the batch processor's outputs are ``{"boxes": ..., "losses": {"box": ..., "class": ...}}``,
    ``losses_key="losses"`` publishes ``loss/box`` and ``loss/class``. If the outputs are the
    losses, as in torchvision's detectors and many policies, set ``losses_key=""``.

    >>> LossTrackerConfig(losses_key="losses")().name
    'LossTracker'
    """

    class_type: type[LossTracker] = LossTracker
    losses_key: str | None = Field(
        default=None,
        description="Key or attribute of the outputs that holds a mapping from names to "
        "losses, each a number or a one-element tensor; '' if the outputs are the mapping; None "
        "tracks only the total.",
    )
    loss_names: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Losses to track; each must be present in every step. None tracks all.",
    )

    def __post_init__(self) -> None:
        if self.loss_names is not None and self.losses_key is None:
            raise ValueError(
                f"loss_names={self.loss_names} needs losses_key, the key of the losses"
            )
