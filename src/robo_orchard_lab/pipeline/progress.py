"""Channels, progress counters and limits of a run.

One run opens the channels like this; each is a scope that hooks attach to::

    on_loop
      on_epoch
        for each batch:
          on_step
            on_batch
              on_model_forward
              on_model_backward      only if the processor needs backward
            on_optimizer_step        only at an accumulation boundary; in on_batch for named steps
          commit point: the step counters have advanced, requests are executed
        commit point: the epoch counter has advanced
      on_evaluation                  around each evaluation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError, check_state_version

MAX_COUNT = 2**53
"""Largest counter: a step every microsecond for 285 years, and exact as a float."""

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
CHANNEL_NAMES: tuple[ChannelName, ...] = get_args(ChannelName)


@dataclass(frozen=True, slots=True)
class PipelineChannel:
    """Stage of a run, as a scope for hooks."""

    name: ChannelName
    parent: ChannelName | None
    """Enclosing channel; None for the outermost."""
    around: str
    """Work between ``before`` and ``after`` of its hooks."""


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
"""All channels, in the order in which a run first opens them."""

STATE_VERSION = 1


@dataclass(slots=True)
class TrainerProgress:
    """Counters of a run; the trainer advances the counters, hooks only read them.

    Inside a step, the ids are the ids of that step, from 0. At a commit point and after the run,
    the ids are those of the next step, that is, the numbers of completed steps and epochs.
    """

    epoch_id: int = 0
    """Epoch; after a run of n epochs it is n."""
    step_id: int = 0
    """Step in the epoch: one batch through forward and backward."""
    global_step_id: int = 0
    """Step in the run."""
    optimizer_step_id: int = 0
    """Number of committed weight updates."""
    skipped_optimizer_steps: int = 0
    """Number of updates that were due and not committed, such as after an fp16 overflow."""
    optimizer_steps: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    """With several optimizers: number of committed updates by name. :attr:`optimizer_step_id` then
    counts the accumulation boundaries with a committed update."""
    skipped_batches: int = field(default=0, init=False, compare=False, repr=False)
    """Number of batches that hooks skipped on this rank; saved with the state of the rank."""
    in_step: bool = field(default=False, init=False, compare=False, repr=False)
    """True inside a step; not part of the state, since a run is saved between two steps."""

    @property
    def steps_done(self) -> int:
        """Number of completed steps, counting an open step as completed.

        This is the step of a measurement, wherever in the step it is taken.
        """
        return self.global_step_id + self.in_step

    def finish_step(self) -> None:
        """Count a batch after its forward and backward."""
        self.in_step = False
        self.step_id += 1
        self.global_step_id += 1

    def finish_epoch(self) -> None:
        """Count a pass over the data."""
        self.epoch_id += 1
        self.step_id = 0

    def finish_optimizer_step(self, committed: bool) -> None:
        """Count an update as committed or skipped."""
        if committed:
            self.optimizer_step_id += 1
        else:
            self.skipped_optimizer_steps += 1

    def finish_named_update(self, name: str, committed: bool, *, is_counted: bool) -> None:
        """Count an update of one of several optimizers.

        ``is_counted`` states that the accumulation boundary is counted already.
        """
        self.optimizer_steps[name] += committed
        if not (committed and is_counted):
            self.finish_optimizer_step(committed)

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 1; between two epochs, of the completed one."""
        return max(1, self.epoch_id + (self.in_step or self.step_id > 0))

    def __str__(self) -> str:
        return (
            f"step {self.steps_done} (epoch {self.epoch}, {self.optimizer_step_id} updates "
            f"committed, {self.skipped_optimizer_steps} skipped)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all counters by name, and the version of the state."""
        counters = asdict(self)
        del counters["in_step"], counters["skipped_batches"]
        if not self.optimizer_steps:
            del counters["optimizer_steps"]
        return {"version": STATE_VERSION, **counters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all counters.

        Raises:
            StateError: the state has another version, or a counter is missing, unknown, or not an
                int >= 0; no counter changes then.
        """
        check_state_version(state, STATE_VERSION, "the progress")
        counters = {name: value for name, value in state.items() if name != "version"}
        expected = self.state_dict().keys() - {"version"}
        if set(counters) != expected:
            raise StateError(
                f"expected the counters {', '.join(sorted(expected))} in the state of the "
                f"progress, found {', '.join(counters) or 'none'}"
            )
        by_name = counters.pop("optimizer_steps", {})
        if not isinstance(by_name, dict) or by_name.keys() != self.optimizer_steps.keys():
            raise StateError(
                "progress.optimizer_steps: expected counts by optimizer for "
                f"{', '.join(self.optimizer_steps)}, found {by_name!r:.60}"
            )
        nested = {f"optimizer_steps.{name}": value for name, value in by_name.items()}
        for name, value in {**counters, **nested}.items():
            if type(value) is not int or not 0 <= value <= MAX_COUNT:
                raise StateError(f"progress.{name} must be an int >= 0, found {value!r:.60}")
        for name, value in counters.items():
            setattr(self, name, value)
        self.optimizer_steps = dict(by_name)


@dataclass(frozen=True, slots=True)
class TrainerLimits:
    """Limits of a run; the first limit reached ends the run.

    Raises:
        PipelineConfigError: no limit is given, or one is not an int >= 1.
    """

    max_step: int | None = None
    """Number of steps (batches)."""
    max_optimizer_step: int | None = None
    """Number of committed weight updates."""
    max_epoch: int | None = None
    """Number of passes over the data."""

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
        """Return True if a limit is reached."""
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
    """Return the number of steps to the nearest limit, or None if unknown.

    >>> limits = TrainerLimits(max_epoch=2)
    >>> remaining_steps(limits, TrainerProgress(epoch_id=1, step_id=3), 10, window=1)
    7

    ``steps_per_epoch`` is None for data without a length, ``window`` the number of steps in a full
    accumulation window.
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
    """Return the number of steps from ``step`` of an epoch until ``updates`` are committed."""
    updates += step // window  # from the start of the epoch
    if steps_per_epoch is None:
        return updates * window - step
    # The last window of an epoch may be short.
    epochs, rest = divmod(updates, -(-steps_per_epoch // window))
    return epochs * steps_per_epoch + min(rest * window, steps_per_epoch) - step
