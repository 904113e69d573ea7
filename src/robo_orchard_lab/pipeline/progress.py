"""How far a run has come, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError

# --- events ----------------------------------------------------------------------------------
# The channels of a training run and how they nest, as data.
#
# Each channel is a scope that hooks attach to. One run opens them like this::
#
#     on_loop
#       on_epoch
#         for each batch:
#           on_step
#             on_batch
#               on_model_forward
#               on_model_backward      only when the processor needs backward
#             on_optimizer_step        only at an accumulation boundary
#           commit point: progress has advanced, requests are decided
#         commit point: the epoch counter has advanced
#       on_evaluation                  around each evaluation


ChannelName: TypeAlias = Literal[
    "on_loop",
    "on_epoch",
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
    "on_evaluation",
]


@dataclass(frozen=True, slots=True)
class PipelineChannel:
    """One scope of a run."""

    name: ChannelName
    parent: ChannelName | None
    """The channel that is open around it; None for the outermost."""
    around: str
    """What its hooks run around."""


PIPELINE_CHANNELS: tuple[PipelineChannel, ...] = (
    PipelineChannel("on_loop", None, "one call of the trainer"),
    PipelineChannel("on_epoch", "on_loop", "one pass over the data"),
    PipelineChannel("on_step", "on_epoch", "one batch, from the data loader to the update"),
    PipelineChannel("on_batch", "on_step", "forward and backward of one batch"),
    PipelineChannel("on_model_forward", "on_batch", "the batch processor's forward"),
    PipelineChannel("on_model_backward", "on_batch", "the backward pass"),
    PipelineChannel("on_optimizer_step", "on_step", "one update of the weights"),
    PipelineChannel("on_evaluation", "on_loop", "one evaluation"),
)
"""Every channel, outermost first, in the order in which a run first opens them."""

CHANNEL_NAMES: tuple[ChannelName, ...] = tuple(channel.name for channel in PIPELINE_CHANNELS)


STATE_VERSION = 1
_COUNTERS = (
    "epoch_id",
    "step_id",
    "global_step_id",
    "optimizer_step_id",
    "skipped_optimizer_steps",
)


@dataclass(slots=True)
class TrainerProgress:
    """The counters of a run. The trainer moves them; everyone else reads them.

    While a step is open, the ids are those of that step, counted from 0. At a commit point, and
    after the run, they are those of the step that would come next, that is, how many are done.
    """

    epoch_id: int = 0
    """The epoch; a finished run of n epochs ends with n."""
    step_id: int = 0
    """The step in the epoch: one batch through forward and backward."""
    global_step_id: int = 0
    """The step in the run."""
    optimizer_step_id: int = 0
    """How many updates of the weights have been committed."""
    skipped_optimizer_steps: int = 0
    """How many updates were due and not committed, such as after an fp16 overflow."""
    in_step: bool = field(default=False, init=False, compare=False, repr=False)
    """Whether a step is open; no part of the state, since a run is saved between two steps."""

    @property
    def steps_done(self) -> int:
        """How many steps of the run are done when the step that is open, if any, is over.

        This is the step that a measurement belongs to, wherever it is taken.
        """
        return self.global_step_id + self.in_step

    def finish_step(self) -> None:
        """A batch went through forward and backward."""
        self.in_step = False
        self.step_id += 1
        self.global_step_id += 1

    def finish_epoch(self) -> None:
        """The data has been passed over once."""
        self.epoch_id += 1
        self.step_id = 0

    def finish_optimizer_step(self, committed: bool) -> None:
        """An update was due: it was committed, or skipped."""
        if committed:
            self.optimizer_step_id += 1
        else:
            self.skipped_optimizer_steps += 1

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch_id}, step {self.step_id} (global step {self.global_step_id}, "
            f"{self.optimizer_step_id} updates committed, {self.skipped_optimizer_steps} skipped)"
        )

    def state_dict(self) -> dict[str, int]:
        """Every counter by its name, and the version of this layout."""
        return {"version": STATE_VERSION, **{name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over every counter.

        Raises:
            StateError: another version, or a counter missing, unknown, or not an int >= 0. The
                counters are then as they were.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"expected a progress state of version {STATE_VERSION}, "
                f"found version {state.get('version')!r}"
            )
        found = {name: value for name, value in state.items() if name != "version"}
        if set(found) != set(_COUNTERS):
            raise StateError(
                f"expected the counters {', '.join(_COUNTERS)} in a progress state, "
                f"found {', '.join(found) or 'none'}"
            )
        for name, value in found.items():
            if type(value) is not int or value < 0:
                raise StateError(f"progress.{name} must be an int >= 0, found {value!r}")
        for name, value in found.items():
            setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class TrainerLimits:
    """Where a run ends: at whichever of its limits is reached first.

    Raises:
        PipelineConfigError: no limit is given, or one is not an int >= 1.
    """

    max_step: int | None = None
    """In steps (batches) over the run."""
    max_optimizer_step: int | None = None
    """In committed updates of the weights."""
    max_epoch: int | None = None
    """In passes over the data."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise PipelineConfigError(
                "a run needs a limit: give max_step, max_optimizer_step or max_epoch"
            )
        for name, value in given.items():
            if type(value) is not int or value < 1:
                raise PipelineConfigError(f"{name} must be an int >= 1, got {value!r}")

    def reached(self, progress: TrainerProgress) -> bool:
        """Whether nothing is left to do."""
        return (
            (self.max_step is not None and progress.global_step_id >= self.max_step)
            or (
                self.max_optimizer_step is not None
                and progress.optimizer_step_id >= self.max_optimizer_step
            )
            or (self.max_epoch is not None and progress.epoch_id >= self.max_epoch)
        )


def remaining_steps(
    limits: TrainerLimits, progress: TrainerProgress, steps_per_epoch: int | None, window: int
) -> int | None:
    """The steps from ``progress`` to the nearest limit, or None where that can't be told.

    >>> limits = TrainerLimits(max_epoch=2)
    >>> remaining_steps(limits, TrainerProgress(epoch_id=1, step_id=3), 10, window=1)
    7

    Args:
        limits: the limits of the run.
        progress: its counters between two steps.
        steps_per_epoch: None for data without a length.
        window: the steps in a full accumulation window.
    """
    found = []
    if limits.max_step is not None:
        found.append(limits.max_step - progress.global_step_id)
    if limits.max_epoch is not None and steps_per_epoch is not None:
        epochs = limits.max_epoch - progress.epoch_id
        found.append(epochs * steps_per_epoch - progress.step_id)
    if limits.max_optimizer_step is not None:
        updates = limits.max_optimizer_step - progress.optimizer_step_id
        found.append(_steps_for_updates(updates, progress.step_id, steps_per_epoch, window))
    return max(0, min(found)) if found else None


def _steps_for_updates(updates: int, step: int, steps_per_epoch: int | None, window: int) -> int:
    """The steps that it takes from ``step`` of an epoch to commit so many updates."""
    updates += step // window  # from the start of the epoch
    if steps_per_epoch is None:
        return updates * window - step
    # The last window of an epoch is as short as the epoch makes it.
    epochs, rest = divmod(updates, -(-steps_per_epoch // window))
    return epochs * steps_per_epoch + min(rest * window, steps_per_epoch) - step
